// Instance normalisation and the leaky ReLU after it, in place: what follows every convolution of
// nnU-Net's networks.
#pragma once

#include <cstdint>

namespace fedcmt {

// For every channel of `size` values x:
//   y = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias
//   x = max(y, y * slope)
struct NormArguments {
  float* values;        // [instances, channels, size]
  int64_t instances;
  int64_t channels;
  int64_t size;
  const float* weight;  // [channels]
  const float* bias;    // [channels]
  double epsilon;
  float slope;  // 0 to 1; 1 leaves y as it is
};

namespace cpu {

void instance_norm(const NormArguments& arguments, int num_threads);

}  // namespace cpu
}  // namespace fedcmt
