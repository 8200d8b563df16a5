// Patches: threads, and the case where nothing is turned or scaled.
#include "../patch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace fedcmt {
namespace cpu {
namespace {

constexpr int64_t kRowsAPiece = 32;

// A warp that moves and mirrors whole voxels only: source index = sign * o + shift on every axis.
struct Crop {
  int64_t sign[3], shift[3];
};

bool find_crop(const double* affine, Crop* crop) {
  for (int axis = 0; axis < 3; ++axis) {
    const double* m = affine + 4 * axis;
    for (int other = 0; other < 3; ++other) {
      if (other == axis ? std::fabs(m[other]) != 1.0 : m[other] != 0.0) return false;
    }
    if (m[3] != std::floor(m[3]) || std::fabs(m[3]) > kWarpLimit) return false;
    crop->sign[axis] = static_cast<int64_t>(m[axis]);
    crop->shift[axis] = static_cast<int64_t>(m[3]);
  }
  return true;
}

// One row of the output; from: the source's row, or nullptr where the row lies outside.
template <typename T>
void copy_row(const T* from, int64_t size, int64_t sign, int64_t shift, T fill, int64_t width, T* to) {
  const int64_t first = sign > 0 ? -shift : shift - size + 1;  // output voxels [first, first + size) lie inside
  const int64_t begin = from == nullptr ? width : std::clamp<int64_t>(first, 0, width);
  const int64_t end = from == nullptr ? width : std::clamp<int64_t>(first + size, begin, width);
  std::fill(to, to + begin, fill);
  std::fill(to + end, to + width, fill);
  if (begin == end) return;
  if (sign > 0) {
    std::memcpy(to + begin, from + begin + shift, static_cast<size_t>(end - begin) * sizeof(T));
    return;
  }
  const T* last = from + shift;
  for (int64_t x = begin; x < end; ++x) to[x] = last[-x];
}

template <typename T>
void copy_rows(const T* from, const int64_t* strides, int maps, T fill, const WarpArguments& a,
               const Crop& crop, int64_t row, T* to) {
  const int64_t d = crop.sign[0] * (row / a.shape[1]) + crop.shift[0];
  const int64_t h = crop.sign[1] * (row % a.shape[1]) + crop.shift[1];
  const bool inside = d >= 0 && d < a.source[0] && h >= 0 && h < a.source[1];
  const int64_t width = a.shape[2], voxels = a.shape[0] * a.shape[1] * width;
  for (int k = 0; k < maps; ++k) {
    const T* line = inside ? from + k * strides[0] + d * strides[1] + h * strides[2] : nullptr;
    copy_row(line, a.source[2], crop.sign[2], crop.shift[2], fill, width, to + k * voxels + row * width);
  }
}

}  // namespace

void warp_patch(const WarpArguments& a, int num_threads) {
  Crop crop{};
  const bool copies = find_crop(a.affine, &crop);
  const int64_t rows = a.shape[0] * a.shape[1];
  const int64_t pieces = (rows + kRowsAPiece - 1) / kRowsAPiece;
  const BlockKernels& kernels = current_kernels();
#pragma omp parallel for schedule(static) num_threads(usable_threads(num_threads, pieces))
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * kRowsAPiece, end = std::min(begin + kRowsAPiece, rows);
    if (!copies) {
      kernels.warp_rows(a, begin, end);
      continue;
    }
    for (int64_t row = begin; row < end; ++row) {
      copy_rows(a.image, a.image_strides, a.channels, 0.0f, a, crop, row, a.out_image);
      copy_rows(a.labels, a.label_strides, a.label_maps, a.label_fill, a, crop, row, a.out_labels);
    }
  }
}

}  // namespace cpu
}  // namespace fedcmt
