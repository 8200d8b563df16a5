// From a network's logits to labels on another grid, the last step of prediction.
#pragma once

#include <cstdint>

namespace fedcmt {

// Linear interpolation along one axis: result[i] = w0[i] * source[first[i]] + w1[i] * source[second[i]].
struct AxisTaps {
  const int32_t* first;   // [size]
  const int32_t* second;  // [size], first + 1, or first at the edges
  const double* w0;       // [size]
  const double* w1;       // [size], 0 where only one sample counts
  int64_t size;
};

struct LabelArguments {
  const uint16_t* logits;      // half [K, D, H, W], the last axis without gaps
  int64_t logit_strides[3];    // of K, D and H, in elements
  const uint16_t* weights;     // half [D, H, W] that divide the logits, or nullptr
  int64_t weight_strides[2];   // of D and H
  int num_heads;               // K
  int64_t shape[3];            // D, H, W
  AxisTaps taps[3];            // to the output's axes
  const int32_t* region_values;  // [K]: a region's label where its logit is above the threshold, later
                                 // regions over earlier ones; nullptr: the first largest logit's index
  float region_threshold;
  void* labels;                // [D', H', W'] of label_bytes (1 or 2) each, unsigned
  int64_t label_strides[3];    // in elements
  int label_bytes;
};

namespace cpu {

// Returns false where a logit overflows half precision or is no number; the labels are void then.
// The result does not depend on the number of threads.
bool logits_to_labels(const LabelArguments& arguments, int num_threads);

}  // namespace cpu
}  // namespace fedcmt
