// Clocks and memory that only sanitizers look at.
//
// A clock is an address: what a thread did before `release` happens before what others do after
// `acquire`. Switching between fibers orders nothing, so that only collectives, atomics and
// launches do. Every collective has a clock of its own: with one for all of a block, a thread that
// runs ahead would seem to be ordered before what others do after an earlier one.
//
// CUDA_ON_CPU_TSAN and CUDA_ON_CPU_ASAN say how the kernels are compiled: the engine itself is not
// instrumented, so the compiler's own macros are not set here.
#pragma once

#include <cstddef>

#ifdef CUDA_ON_CPU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

#ifdef CUDA_ON_CPU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

namespace cuda_on_cpu {

#ifdef CUDA_ON_CPU_TSAN
constexpr bool kChecksRaces = true;
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
#else
constexpr bool kChecksRaces = false;
inline void release(void*) {}
inline void acquire(void*) {}
#endif

#ifdef CUDA_ON_CPU_ASAN
inline void poison(void* address, size_t size) { __asan_poison_memory_region(address, size); }
inline void unpoison(void* address, size_t size) { __asan_unpoison_memory_region(address, size); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

}  // namespace cuda_on_cpu
