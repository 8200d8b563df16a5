#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef __x86_64__
// Saves what a call has to preserve, then goes on where `to` stopped.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {
namespace {

#ifdef CUDA_ON_CPU_ASAN
// AddressSanitizer says where the host's stack lies when the first fiber starts.
const void* host_bottom;
size_t host_size;
#endif

}  // namespace

void create_fiber(Fiber* fiber, char* stack, size_t stack_size) {
  mprotect(stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  fiber->stack = stack;
  fiber->stack_size = stack_size;
#ifdef CUDA_ON_CPU_TSAN
  fiber->thread = __tsan_create_fiber(0);
#endif
}

void prepare(Fiber* fiber, void (*entry)()) {
#ifdef __x86_64__
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber->stack + fiber->stack_size);
  auto* slot = reinterpret_cast<volatile uintptr_t*>(top & ~uintptr_t{15});
  *--slot = 0;  // where a caller would be, so that the stack is aligned as after a call
  *--slot = reinterpret_cast<uintptr_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--slot = 0;
  fiber->stack_pointer = const_cast<uintptr_t*>(slot);
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = fiber->stack_size;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
#endif
}

void switch_fiber(Fiber* from, Fiber* to, bool leaving) {
  (void)leaving;
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from->fake_stack,
                                 to->stack ? to->stack : host_bottom,
                                 to->stack ? to->stack_size : host_size);
#endif
#ifdef CUDA_ON_CPU_TSAN
  constexpr unsigned kNoSynchronisation = 1;
  __tsan_switch_to_fiber(to->thread, kNoSynchronisation);
#endif
#ifdef __x86_64__
  cuda_on_cpu_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

void begin_fiber() {
#ifdef CUDA_ON_CPU_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (host_bottom == nullptr) {  // the host starts the first fiber
    host_bottom = bottom;
    host_size = size;
  }
#endif
}

void adopt_host(Fiber* host) {
  *host = Fiber{};
#ifdef CUDA_ON_CPU_ASAN
  host_bottom = nullptr;
#endif
#ifdef CUDA_ON_CPU_TSAN
  host->thread = __tsan_get_current_fiber();
#endif
}

char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("cuda_on_cpu: mmap");
    std::abort();
  }
  return static_cast<char*>(memory);
}

}  // namespace cuda_on_cpu
