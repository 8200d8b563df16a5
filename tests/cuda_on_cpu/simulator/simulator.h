// CUDA C++ for a host compiler: what a kernel file needs to run on the CPU, unchanged.
//
// Compile a .cu file as C++ with this header before it (g++ -x c++ -include simulator.h) and link
// the engine. What is missing here is a compile error, never a silent difference: raw __shared__
// and <<<>>> are left to the compiler to reject, csrc/cuda/device.cuh has macros for both.
//
// Environment, read at every launch:
//   CUDA_ON_CPU_ORDER  forward (default), reverse or random: the order of blocks and of threads
//   CUDA_ON_CPU_SEED   a number for `random`
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "engine.h"

// --- keywords ---

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)

// --- what csrc/cuda/device.cuh leaves to its surroundings ---

#define FEDCMT_SIMULATED 1
#define FEDCMT_LAUNCH(kernel, grid, block, stream, ...) \
  ::cuda_on_cpu::launch(kernel, grid, block, 0, stream, __VA_ARGS__)
#define FEDCMT_SHARED(type, name, extents)             \
  static const char name##_key = 0;                    \
  type(&name) extents = *static_cast<type(*) extents>( \
      ::cuda_on_cpu::shared_array(&name##_key, sizeof(type extents), #name))

namespace cuda_on_cpu {

// Every thread gets its own copy of the arguments, converted to the kernel's parameter types.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
            cudaStream_t, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, std::tuple<std::decay_t<Parameters>...>(arguments...)};
  run_grid(
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, dynamic_bytes,
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}

template <typename T>
Word to_word(const T& value) {
  static_assert(sizeof(T) <= sizeof(Word) && std::is_trivially_copyable_v<T>);
  Word word{};
  __builtin_memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
T from_word(const Word& word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}

template <typename T>
T shuffle_value(uint32_t mask, const T& value, int source_lane, const Site& site) {
  return from_word<T>(shuffle(mask, to_word(value), source_lane, site));
}

// CUDA gives a lane its own value back where the source would lie outside its part of the warp.
inline int source_in_part(int source, int width) {
  const int first = lane() & ~(width - 1);
  return source >= first && source < first + width ? source : lane();
}

// CUDA's atomics order nothing by themselves; with a fence before it, an atomic publishes what its
// thread wrote. Reading through an atomic is taken to acquire: `last block done` needs no more.
template <typename T, typename Function>
T atomic_update(T* target, Function next) {
  const bool publish = take_fence();
  T old = __atomic_load_n(target, __ATOMIC_ACQUIRE);
  while (true) {
    const T desired = next(old);
    const bool done = publish ? __atomic_compare_exchange_n(target, &old, desired, false,
                                                            __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
                              : __atomic_compare_exchange_n(target, &old, desired, false,
                                                            __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE);
    if (done) return old;
  }
}

}  // namespace cuda_on_cpu

// --- collectives ---

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::sync_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::sync_warp(mask, {"__syncwarp", file, line});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const int from = (cuda_on_cpu::lane() & ~(width - 1)) + (source & (width - 1));
  return cuda_on_cpu::shuffle_value(mask, value, from, {"__shfl_sync", file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int from = cuda_on_cpu::source_in_part(cuda_on_cpu::lane() ^ bits, width);
  return cuda_on_cpu::shuffle_value(mask, value, from, {"__shfl_xor_sync", file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int from =
      cuda_on_cpu::source_in_part(cuda_on_cpu::lane() + static_cast<int>(delta), width);
  return cuda_on_cpu::shuffle_value(mask, value, from, {"__shfl_down_sync", file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int from =
      cuda_on_cpu::source_in_part(cuda_on_cpu::lane() - static_cast<int>(delta), width);
  return cuda_on_cpu::shuffle_value(mask, value, from, {"__shfl_up_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}

inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, {"__all_sync", file, line}) == mask;
}

namespace cuda_on_cpu {

// What mma.sync.m8n8k4 does with float64: sums += A B' for blocks A and B of 8 rows and 4 columns.
// Lane l holds element l % 4 of row l / 4 of each, and the sums of row l / 4 of A with the rows
// 2 (l % 4) and 2 (l % 4) + 1 of B.
inline void mma_m8n8k4(double a, double b, double (&sums)[2], CUDA_ON_CPU_SITE) {
  struct Pair {
    double a, b;
  };
  const Word* words = exchange(to_word(Pair{a, b}), {"mma.m8n8k4", file, line});
  for (int k = 0; k < 4; ++k) {
    const double x = from_word<Pair>(words[lane() / 4 * 4 + k]).a;
    for (int v = 0; v < 2; ++v) {
      const double y = from_word<Pair>(words[(lane() % 4 * 2 + v) * 4 + k]).b;
      sums[v] = std::fma(x, y, sums[v]);
    }
  }
}

}  // namespace cuda_on_cpu

// --- memory ---

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T __ldcs(const T* address) {
  return *address;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

template <typename T>
T atomicAdd(T* target, T value) {
  static_assert(std::is_integral_v<T>, "floating-point atomics depend on the order of threads");
  return cuda_on_cpu::atomic_update(target, [=](T old) { return static_cast<T>(old + value); });
}

inline unsigned atomicInc(unsigned* target, unsigned limit) {
  return cuda_on_cpu::atomic_update(target,
                                    [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// --- arithmetic ---

using std::fma;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// The engine is compiled without contraction or fused instructions: every result is rounded.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

inline unsigned __float_as_uint(float value) {
  return cuda_on_cpu::from_word<unsigned>(cuda_on_cpu::to_word(value));
}
inline float __uint_as_float(unsigned bits) {
  return cuda_on_cpu::from_word<float>(cuda_on_cpu::to_word(bits));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
