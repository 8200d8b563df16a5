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

// One channel's changes, in the order of the fields.
struct ChannelChanges {
  float noise;             // standard deviation; 0: none
  const float* taps[3];    // of a symmetric filter along D, H, W, [2 * radius + 1]; nullptr: none
  int radius[3];
  float brightness;        // a factor; 1: none
  float contrast;          // a factor about the mean, kept within the range; 1: none
  int64_t small[3];        // thinned to this size (nearest) and enlarged again; 0: not
  float gamma_inverted;    // an exponent for the negated values; 0: none
  float gamma;             // an exponent; 0: none
};

// Filters fold at the borders without repeating the border's voxel. Gamma raises the place of a
// value within its range to a power and then restores mean and standard deviation. All statistics
// are a channel's own, at that moment.
struct IntensityArguments {
  float* image;  // [C, D, H, W] without gaps, changed in place
  int channels;
  int64_t shape[3];
  const ChannelChanges* changes;  // [C]
  uint64_t seed;                  // of the noise
  bool mirrored[3];  // the image lies mirrored: the nearest voxel is chosen from the other side
};

// Of the values that a pass has written.
struct Totals {
  float least, largest;
  double sum, squares;
};

// A function of one value. u stands for scale * x + shift.
struct PointChange {
  enum Kind { kNothing, kLinear, kStretch, kPower } kind;
  float scale, shift;     // kLinear: u
  float low, high;        // kStretch: u, kept within [low, high]
  float width, exponent;  // kPower: ((u - low) / width)^exponent, its base kept within [0, 1]
};

// Normal numbers for voxel v of a channel, all from Philox4x32-10 (Salmon et al., 2011) with the
// key `seed`: block v / 64 of voxels takes 16 counters (index, 0, channel, 0), index = 16 * block +
// v % 16, and word v % 64 / 16 of each. Words 0 and 1 give a pair by Box and Muller, so do 2 and 3.
constexpr int kNoiseBlock = 64;
constexpr int kNoiseLanes = 16;

namespace cpu {

// The results do not depend on the number of threads.
void warp_patch(const WarpArguments& arguments, int num_threads);
void change_intensities(const IntensityArguments& arguments, int num_threads);

}  // namespace cpu

namespace cuda {

int warp_patch(const WarpArguments& arguments, const Launch& launch);

int64_t change_intensities_workspace_bytes(const IntensityArguments& arguments);
int change_intensities(const IntensityArguments& arguments, const Launch& launch);

}  // namespace cuda
}  // namespace fedcmt
