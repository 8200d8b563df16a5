// A fiber: a stack and the place where it stopped.
#pragma once

#include <cstddef>

#include "ordering.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

struct Fiber {
  char* stack = nullptr;  // lowest address; nullptr for the host's own stack
  size_t stack_size = 0;
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#ifdef CUDA_ON_CPU_ASAN
  void* fake_stack = nullptr;
#endif
#ifdef CUDA_ON_CPU_TSAN
  void* thread = nullptr;  // ThreadSanitizer's name for it
#endif
};

// A fiber on this memory, the lowest page of which becomes a guard.
void create_fiber(Fiber* fiber, char* stack, size_t stack_size);

// Prepares `fiber` to run `entry`, which never returns, on its stack.
void prepare(Fiber* fiber, void (*entry)());

// Stops `from` and runs `to`; orders nothing. `leaving`: `from` never runs again.
void switch_fiber(Fiber* from, Fiber* to, bool leaving);

// Has to be called first thing in an `entry`.
void begin_fiber();

// The host's own stack as a fiber.
void adopt_host(Fiber* host);

// Zeroed memory that takes up space only where it is touched.
char* map_memory(size_t bytes);

}  // namespace cuda_on_cpu
