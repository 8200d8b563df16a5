// A warped patch: one thread a voxel, all channels and label maps. csrc/patch.h defines every bit.
#include "../patch.h"
#include "device.cuh"

namespace fedcmt {
namespace cuda {
namespace {

// Where a voxel lies between the samples of the source.
struct Cell {
  int index[3];  // the lower corner along D, H, W
  float fraction[3];
  float weight[8];  // bit 2 of a corner's number is D, bit 1 H, bit 0 W
};

__device__ __forceinline__ void locate(double base, float step, int lane, int* index,
                                       float* fraction) {
  const double limited = fmin(fmax(base, -kWarpLimit), kWarpLimit);
  const double whole = floor(limited);
  const float start = static_cast<float>(limited - whole);
  const float place = __fadd_rn(start, __fmul_rn(static_cast<float>(lane), step));
  const float cell = floorf(place);
  *index = static_cast<int>(whole) + static_cast<int>(cell);
  *fraction = place - cell;
}

__device__ __forceinline__ Cell find_cell(const WarpArguments& a, int64_t voxel) {
  const int64_t row = voxel / a.shape[2];
  const auto x = static_cast<int>(voxel - row * a.shape[2]);
  const auto z = static_cast<double>(row / a.shape[1]), y = static_cast<double>(row % a.shape[1]);
  const int lane = x % kWarpBlock;
  Cell cell;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const double* m = a.affine + 4 * axis;
    const double start = __dadd_rn(__dadd_rn(__dmul_rn(m[0], z), __dmul_rn(m[1], y)), m[3]);
    const double base = __dadd_rn(start, __dmul_rn(static_cast<double>(x - lane), m[2]));
    locate(base, static_cast<float>(m[2]), lane, &cell.index[axis], &cell.fraction[axis]);
  }
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const float* f = cell.fraction;
    const float w = (corner & 1) != 0 ? f[2] : 1.0f - f[2];
    const float h = (corner & 2) != 0 ? f[1] : 1.0f - f[1];
    const float d = (corner & 4) != 0 ? f[0] : 1.0f - f[0];
    cell.weight[corner] = __fmul_rn(__fmul_rn(w, h), d);
  }
  return cell;
}

template <typename T>
__device__ __forceinline__ T read_corner(const T* from, const int64_t* strides,
                                         const int64_t* source, const Cell& cell, int corner,
                                         T fill) {
  const int64_t d = cell.index[0] + ((corner >> 2) & 1);
  const int64_t h = cell.index[1] + ((corner >> 1) & 1);
  const int64_t w = cell.index[2] + (corner & 1);
  const bool inside =
      d >= 0 && d < source[0] && h >= 0 && h < source[1] && w >= 0 && w < source[2];
  return inside ? __ldg(from + d * strides[1] + h * strides[2] + w) : fill;
}

__device__ __forceinline__ float score_of(int label, const int* labels, const float* weight) {
  float score = 0.0f;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const float share = labels[corner] == label ? __fmul_rn(weight[corner], 1000.0f) : 0.0f;
    score = __fadd_rn(score, share);
  }
  return __half2float(__float2half_rn(score));
}

// Rounds half to even, as nearbyint does.
__device__ __forceinline__ bool is_upper(const Cell& cell, int axis) {
  const float fraction = cell.fraction[axis];
  return fraction > 0.5f || (fraction == 0.5f && (cell.index[axis] & 1) != 0);
}

__device__ __forceinline__ int decide(const int* labels, const Cell& cell) {
  const int nearest_corner = is_upper(cell, 0) * 4 + is_upper(cell, 1) * 2 + is_upper(cell, 2);
  int winner = labels[0], nearest = labels[0];
  float largest = score_of(winner, labels, cell.weight);
#pragma unroll
  for (int corner = 1; corner < 8; ++corner) {
    const float score = score_of(labels[corner], labels, cell.weight);
    const bool better = score > largest || (score == largest && labels[corner] < winner);
    winner = better ? labels[corner] : winner;
    largest = better ? score : largest;
    nearest = corner == nearest_corner ? labels[corner] : nearest;
  }
  return score_of(nearest, labels, cell.weight) == largest ? nearest : winner;
}

__device__ __forceinline__ int warp_label(const WarpArguments& a, const int16_t* from,
                                          const Cell& cell) {
  int labels[8];
  bool equal = true;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    labels[corner] =
        read_corner(from, a.label_strides, a.source, cell, corner, a.label_fill);
    equal = equal && labels[corner] == labels[0];
  }
  return equal ? labels[0] : decide(labels, cell);
}

__device__ __forceinline__ float warp_value(const WarpArguments& a, const float* from,
                                            const Cell& cell) {
  float sum = 0.0f;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const float value = read_corner(from, a.image_strides, a.source, cell, corner, 0.0f);
    sum = __fadd_rn(sum, __fmul_rn(value, cell.weight[corner]));
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, 3) warp_patch_kernel(WarpArguments a, int64_t voxels) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t voxel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; voxel < voxels; voxel += stride) {
    const Cell cell = find_cell(a, voxel);
#pragma unroll 1
    for (int c = 0; c < a.channels; ++c) {
      a.out_image[c * voxels + voxel] = warp_value(a, a.image + c * a.image_strides[0], cell);
    }
#pragma unroll 1
    for (int l = 0; l < a.label_maps; ++l) {
      const int label = warp_label(a, a.labels + l * a.label_strides[0], cell);
      a.out_labels[l * voxels + voxel] = static_cast<int16_t>(label);
    }
  }
}

}  // namespace

int warp_patch(const WarpArguments& arguments, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int64_t voxels = arguments.shape[0] * arguments.shape[1] * arguments.shape[2];
  FEDCMT_RUN(warp_patch_kernel, static_cast<unsigned>(count_grid_blocks(voxels, kThreads)),
             kThreads, static_cast<cudaStream_t>(launch.stream), arguments, voxels);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
