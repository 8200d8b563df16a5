// What an instruction-set path offers for intensities: the work on one plane or run of voxels.
#pragma once

#include <cstdint>

#include "../patch.h"

namespace fedcmt {
namespace cpu {

struct Filter {
  const float* taps;  // [2 * radius + 1], or nullptr where nothing is filtered
  int radius;
};

// Linear interpolation of a plane [H, W] from a small one [h, w]:
// first * (1 - share) + next * share, where next is first or first + 1.
struct Steps {
  const int32_t* first;
  const int32_t* next;
  const float* share;
};

struct IntensityKernels {
  // voxels[begin, end) += sigma * normal numbers; begin is a multiple of kNoiseBlock.
  void (*add_noise)(float* voxels, int64_t begin, int64_t end, float sigma, uint64_t seed,
                    uint32_t channel);

  // A plane [H, W] filtered along W and H. row: [W + 2 * radius, rounded up to vectors]; rows: [H, W].
  void (*filter_plane)(const float* from, int64_t height, int64_t width, Filter along_h,
                       Filter along_w, float* row, float* rows, float* to);

  // to = sum of weights[k] * planes[k]; totals, where not nullptr, are overwritten.
  void (*add_planes)(const float* const* planes, const float* weights, int count, int64_t size,
                     float* to, Totals* totals);

  // In place; totals as above.
  void (*change_points)(const PointChange& change, int64_t size, float* voxels, Totals* totals);

  // Rows of a plane from the rows [h, w] of a small one; row: [w + 1, rounded up to vectors].
  void (*enlarge_plane)(const float* small, int64_t small_width, int64_t height, int64_t width,
                        Steps along_h, Steps along_w, float* row, float* to, Totals* totals);
};

}  // namespace cpu
}  // namespace fedcmt
