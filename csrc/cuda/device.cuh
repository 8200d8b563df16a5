// What the kernels share: launching, the device of a call, and constants.
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

// The only way that kernels are launched: counts them.
#define FEDCMT_RUN(...)                \
  do {                                 \
    ++::fedcmt::cuda::launch_count();  \
    FEDCMT_LAUNCH(__VA_ARGS__);        \
  } while (0)

namespace fedcmt {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Grids depend on lengths only, never on the device: results are the same on every GPU.
constexpr int64_t kMaxBlocks = 2048;

inline int64_t& launch_count() {
  static thread_local int64_t count = 0;
  return count;
}

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t count_grid_blocks(int64_t length, int64_t elements_a_block) {
  const int64_t blocks = divide_up(length, elements_a_block);
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

// True for nullptr as well.
inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

inline bool are_aligned(const Rows& rows) {
  for (int i = 0; i < rows.count; ++i) {
    if (!is_aligned(rows.pointer[i])) return false;
  }
  return true;
}

inline bool are_aligned(const StepTarget& target) {
  return is_aligned(target.params) && is_aligned(target.momentum) && is_aligned(target.second);
}

}  // namespace cuda
}  // namespace fedcmt
