// Training patches: taken out of a case, turned, scaled and mirrored in one pass.
#pragma once

#include <cstdint>

#include "ops.h"

namespace fedcmt {

// Voxels of an output row whose coordinates share one float64 base; their offsets from it are
// float32. Part of the definition, so that every implementation gives the same bits.
constexpr int kWarpBlock = 16;
// Coordinates further away are moved here, far outside of any source, where float64 still counts
// exactly and int32 does not overflow.
constexpr double kWarpLimit = 268435456.0;  // 2^28

// Output voxel o takes the source at p = affine[:, :3] o + affine[:, 3], indices along (D, H, W).
//
// With floor and fraction of p the eight samples around it have the weights
//   (W: 1 - fw or fw) * (H: ...) * (D: ...),
// products and sums in this order, corners in the order of D, then H, then W, each rounded to
// float32. Samples outside are 0 and label_fill. A label's score is the sum of 1000 * weight over
// the corners that have it, rounded to half precision; the largest wins, of several the label of
// the nearest sample if it is among them, else the lowest.
struct WarpArguments {
  const float* image;        // [C, D, H, W], the last axis without gaps
  int64_t image_strides[3];  // of C, D and H, in elements
  int channels;              // C >= 0
  const int16_t* labels;     // [L, D, H, W], likewise
  int64_t label_strides[3];
  int label_maps;            // L >= 0
  int16_t label_fill;
  int64_t source[3];         // D, H, W, each >= 1
  double affine[12];         // [3, 4]
  int64_t shape[3];          // D', H', W'
  float* out_image;          // [C, D', H', W'] without gaps
  int16_t* out_labels;       // [L, D', H', W'] without gaps
};

namespace cpu {

// The result does not depend on the number of threads.
void warp_patch(const WarpArguments& arguments, int num_threads);

}  // namespace cpu

namespace cuda {

int warp_patch(const WarpArguments& arguments, const Launch& launch);

}  // namespace cuda
}  // namespace fedcmt
