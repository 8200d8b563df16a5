// What the kernels share: launching, wide loads, and reductions with a fixed order of additions.
#pragma once

#ifndef FEDCMT_LAUNCH  // a host-side simulator of CUDA defines its own before including this file
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FEDCMT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define FEDCMT_SHARED(type, name, extents) __shared__ type name extents
#endif

#include <cstdint>

#include "../ops.h"

namespace fedcmt {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The grid depends on the length only, never on the device: results are the same on every GPU.
constexpr int64_t kMaxBlocks = 1024;

inline int64_t count_grid_blocks(int64_t length, int64_t elements_a_block) {
  const int64_t blocks = (length + elements_a_block - 1) / elements_a_block;
  return blocks < 1 ? 1 : (blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Makes `device` current for the launches of one call, then restores what was current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (status_ == cudaSuccess) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  cudaError_t status_;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// 16 bytes of a row.
template <typename T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Elements [first, first + kSize) of a row; zeros beyond its length. Rows that do not start at a
// multiple of 16 bytes are read one element at a time, into the same places: alignment changes the
// speed of a result, never its value.
template <typename T, bool kAligned>
__device__ __forceinline__ Packet<T> load_packet(const T* row, int64_t first, int64_t length) {
  Packet<T> packet;
  if (kAligned && first + Packet<T>::kSize <= length) {
    *reinterpret_cast<uint4*>(&packet) = __ldg(reinterpret_cast<const uint4*>(row + first));
  } else {
#pragma unroll
    for (int k = 0; k < Packet<T>::kSize; ++k) {
      packet.value[k] = first + k < length ? row[first + k] : T{};
    }
  }
  return packet;
}

// Sum over the threads of a block, in a fixed order; the result is valid in thread 0.
// partial: shared memory [kWarps], free again after the next __syncthreads.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  A total{};
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
  }
  return total;
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace cuda
}  // namespace fedcmt
