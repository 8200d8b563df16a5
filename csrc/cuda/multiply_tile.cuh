// Products of 8 x 4 blocks on the float64 tensor cores.
//
// Lane l holds element l % 4 of row l / 4 of a block of 8 rows and 4 elements, and of a tile of
// 8 x 8 sums those in row l / 4 and columns 2 (l % 4) and 2 (l % 4) + 1. Left and right factors are
// laid out alike, so a Gram matrix needs its rows only once.
#pragma once

#include "device.cuh"

namespace fedcmt {
namespace cuda {

// sums += A B' for blocks A and B.
__device__ __forceinline__ void multiply_tile(double a, double b, double (&sums)[2]) {
#ifdef FEDCMT_SIMULATED
  ::cuda_on_cpu::mma_m8n8k4(a, b, sums);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sums[0]), "+d"(sums[1])
               : "d"(a), "d"(b));
#endif
}

// The same for two left factors. From sm_90 on this is one instruction, in the time of
// multiply_tile.
__device__ __forceinline__ void multiply_two_tiles(double a0, double a1, double b,
                                                   double (&sums0)[2], double (&sums1)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+d"(sums0[0]), "+d"(sums0[1]), "+d"(sums1[0]), "+d"(sums1[1])
      : "d"(a0), "d"(a1), "d"(b));
#else
  multiply_tile(a0, b, sums0);
  multiply_tile(a1, b, sums1);
#endif
}

}  // namespace cuda
}  // namespace fedcmt
