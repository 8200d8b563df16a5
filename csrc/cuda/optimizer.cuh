// The server optimizers on the elements that one thread holds.
#pragma once

#include "packet.cuh"
#include "reduce.cuh"

namespace fedcmt {
namespace cuda {

struct StepRule {
  Optimizer optimizer;
  float lr, beta, gain, beta2, epsilon;
};

inline StepRule make_rule(const StepArguments& step) {
  return {step.optimizer, step.lr, step.beta, step.gain, step.beta2, step.epsilon};
}

struct StepTotals {
  double squares;
  double nonfinite;  // a count
};

__device__ __forceinline__ void merge(StepTotals& into, const StepTotals& from) {
  into.squares += from.squares;
  into.nonfinite += from.nonfinite;
}

__device__ __forceinline__ StepTotals shift_down(const StepTotals& totals, int offset) {
  return {__shfl_down_sync(kFullWarp, totals.squares, offset),
          __shfl_down_sync(kFullWarp, totals.nonfinite, offset)};
}

template <int kSize>
__device__ __forceinline__ void advance_second(const StepRule& rule, const float* d,
                                               float* second) {
  const float rest = 1.0f - rule.beta2;
  switch (rule.optimizer) {
    case Optimizer::kAdam:
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        second[k] = fmaf(rule.beta2, second[k], rest * (d[k] * d[k]));
      }
      break;
    case Optimizer::kYogi:
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const float square = d[k] * d[k];
        const float sign = second[k] > square ? 1.0f : (second[k] < square ? -1.0f : 0.0f);
        second[k] = fmaf(-rest * sign, square, second[k]);
      }
      break;
    default:
#pragma unroll
      for (int k = 0; k < kSize; ++k) second[k] = fmaf(d[k], d[k], second[k]);
      break;
  }
}

// Elements [e, e + kSize) of one target, given d; adds to the totals. kAdaptive: every optimizer
// but SGD. Elements outside the range are neither written nor counted.
template <int kSize, bool kAdaptive, bool kWide>
__device__ __forceinline__ void step_elements(const StepRule& rule, const StepTarget& target,
                                              const float* d, int64_t e, const Range& range,
                                              double& squares, int& nonfinite) {
  float momentum[kSize], second[kSize], params[kSize];
  // With beta 0 the old momentum is not read: 0 * inf must not poison the step.
  const bool accumulate = target.momentum != nullptr && rule.beta != 0.0f;
  if (accumulate) load_floats<kWide, kSize>(target.momentum, e, range, momentum);
  if (kAdaptive) load_floats<kWide, kSize>(target.second, e, range, second);
  load_floats<kWide, kSize>(target.params, e, range, params);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const float gained = rule.gain * d[k];
    momentum[k] = accumulate ? fmaf(rule.beta, momentum[k], gained) : gained;
  }
  if (kAdaptive) advance_second<kSize>(rule, d, second);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    float step = momentum[k];
    if (kAdaptive) step /= sqrtf(second[k]) + rule.epsilon;
    params[k] = fmaf(rule.lr, step, params[k]);
    if (kWide || contains(range, e + k)) {
      nonfinite += !isfinite(d[k]);
      squares = fma(static_cast<double>(step), static_cast<double>(step), squares);
    }
  }
  if (target.momentum != nullptr) store_floats<kWide, kSize>(momentum, target.momentum, e, range);
  if (kAdaptive) store_floats<kWide, kSize>(second, target.second, e, range);
  store_floats<kWide, kSize>(params, target.params, e, range);
}

}  // namespace cuda
}  // namespace fedcmt
