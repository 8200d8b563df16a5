// Totals over the threads of a block and over the blocks of a grid, in a fixed order.
//
// A, the type of a total, is a double or a struct with merge(A&, const A&) and
// shift_down(A, offset). A{} is the total of nothing.
#pragma once

#include "device.cuh"

namespace fedcmt {
namespace cuda {

__device__ __forceinline__ void merge(double& into, double from) { into += from; }
__device__ __forceinline__ double shift_down(double value, int offset) {
  return __shfl_down_sync(kFullWarp, value, offset);
}

// Valid in lane 0.
template <typename A>
__device__ __forceinline__ A warp_total(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) merge(value, shift_down(value, offset));
  return value;
}

// Valid in thread 0. partial: shared memory [kWarps], free again after the next __syncthreads.
template <typename A>
__device__ __forceinline__ A block_total(A value, A* partial) {
  value = warp_total(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) merge(value, partial[warp]);
  }
  return value;
}

// Reads what another block has written, past the first-level cache.
template <typename A>
__device__ __forceinline__ A read_volatile(const A* from) {
  static_assert(sizeof(A) % sizeof(double) == 0, "read as doubles");
  constexpr int kWords = sizeof(A) / sizeof(double);
  union {
    double word[kWords];
    A value;
  };
  const volatile double* source = reinterpret_cast<const volatile double*>(from);
#pragma unroll
  for (int k = 0; k < kWords; ++k) word[k] = source[k];
  return value;
}

// The block that finishes last merges the totals of all blocks in the order of their indices: one
// launch, and no bit depends on which block that is. True in the one thread that then holds the
// result in `value`. partials: [gridDim.x]; counter: zero before the launch.
template <typename A>
__device__ __forceinline__ bool grid_total(A& value, A* partials, unsigned* counter) {
  FEDCMT_SHARED(A, warp_totals, [kWarps]);
  FEDCMT_SHARED(unsigned, finished, [1]);
  value = block_total(value, warp_totals);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = value;
    __threadfence();
    finished[0] = atomicAdd(counter, 1u) + 1;
  }
  __syncthreads();
  if (finished[0] != gridDim.x) return false;
  __threadfence();
  value = A{};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    merge(value, read_volatile(partials + b));
  }
  value = block_total(value, warp_totals);
  return threadIdx.x == 0;
}

}  // namespace cuda
}  // namespace fedcmt
