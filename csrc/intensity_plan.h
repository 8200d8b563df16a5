// From a channel's statistics to the functions of one value that the next pass applies. Once for the
// CPU and for CUDA; not for the files of one instruction set (see cpu/block_kernels.h).
#pragma once

#include <cmath>

#include "patch.h"

#ifdef __CUDACC__
#define FEDCMT_BOTH __host__ __device__
#else
#define FEDCMT_BOTH
#endif

namespace fedcmt {

constexpr float kLeastWidth = 1e-7f;  // of a range or a deviation that is divided by

// What nnU-Net's transforms ask of a channel.
struct Statistics {
  float least, largest;
  double mean, deviation;
};

FEDCMT_BOTH inline Statistics statistics_of(const Totals& totals, int64_t count) {
  const auto n = static_cast<double>(count);
  const double mean = totals.sum / n;
  const double squares = totals.squares - totals.sum * mean;
  // Of a single voxel: NaN, as in torch.
  return {totals.least, totals.largest, mean, sqrt((squares < 0.0 ? 0.0 : squares) / (n - 1))};
}

FEDCMT_BOTH inline PointChange multiplying(float factor) {
  return {PointChange::kLinear, factor, 0, 0, 0, 0, 0};
}

FEDCMT_BOTH inline PointChange stretching(const Statistics& s, float contrast) {
  const auto shift = static_cast<float>(s.mean * (1.0 - contrast));
  return {PointChange::kStretch, contrast, shift, s.least, s.largest, 0, 0};
}

// A gamma in progress: the voxels stand for scale * voxel + shift, which has these statistics.
struct Gamma {
  Statistics statistics;
  float scale, shift;
};

// The power of the places within the range, which lies in [0, 1]. `sign` is -1 for the gamma of the
// negated values.
FEDCMT_BOTH inline PointChange raising(const Gamma& gamma, float sign, float exponent) {
  const Statistics& s = gamma.statistics;
  const float width = s.largest - s.least;
  return {PointChange::kPower,
          sign * gamma.scale,
          sign * gamma.shift,
          sign > 0 ? s.least : -s.largest,
          0,
          width > kLeastWidth ? width : kLeastWidth,
          exponent};
}

// Back from the powers, whose statistics are given, to the mean and deviation from before: a linear
// change, which the next pass takes along.
FEDCMT_BOTH inline Gamma restoring(const Gamma& before, float sign, const Statistics& powers) {
  const Statistics& s = before.statistics;
  const double width = static_cast<double>(s.largest) - s.least;
  const double deviation = powers.deviation * width;
  const double factor = width * s.deviation / (deviation > kLeastWidth ? deviation : kLeastWidth);
  const auto scale = static_cast<float>(sign * factor);
  const auto shift = static_cast<float>(s.mean - sign * factor * powers.mean);
  // As the next pass will compute them: the least value has to be 0 there, whose power is 0.
  const float first = powers.least * scale + shift, second = powers.largest * scale + shift;
  return {{first < second ? first : second, first < second ? second : first, s.mean,
           powers.deviation * factor},
          scale,
          shift};
}

}  // namespace fedcmt
