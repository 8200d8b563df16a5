// The kernels of change_intensities.cu: one thread a voxel. Statistics and what follows from them stay
// on the device.
#pragma once

#include "../intensity_plan.h"
#include "device.cuh"
#include "reduce.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kMaxTaps = 64;
constexpr int64_t kVoxelsABlock = 4 * kThreads;

// Numbers whose order is that of the values; 0 is below all of them, and stands for none.
__device__ __forceinline__ double order_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(double order) {
  const auto bits = static_cast<unsigned>(order);
  return __uint_as_float((bits & 0x80000000u) != 0 ? bits ^ 0x80000000u : ~bits);
}

struct DeviceTotals {
  double negated, largest;  // orders of the largest of -x and of x
  double sum, squares;

  __device__ __forceinline__ void add(float x) {
    negated = fmax(negated, order_of(-x));
    largest = fmax(largest, order_of(x));
    sum += x;
    squares = fma(static_cast<double>(x), static_cast<double>(x), squares);
  }
};

__device__ __forceinline__ void merge(DeviceTotals& into, const DeviceTotals& from) {
  into.negated = fmax(into.negated, from.negated);
  into.largest = fmax(into.largest, from.largest);
  into.sum += from.sum;
  into.squares += from.squares;
}

__device__ __forceinline__ DeviceTotals shift_down(const DeviceTotals& totals, int offset) {
  return {__shfl_down_sync(kFullWarp, totals.negated, offset),
          __shfl_down_sync(kFullWarp, totals.largest, offset),
          __shfl_down_sync(kFullWarp, totals.sum, offset),
          __shfl_down_sync(kFullWarp, totals.squares, offset)};
}

// What follows from a pass's statistics.
enum class Next { kNothing, kStretch, kRaise, kRestore };

struct Plan {
  Next next[2];            // one after the other
  float contrast;          // kStretch
  float sign[2];           // of kRestore and kRaise
  float exponent;          // kRaise
};

// What stays on the device from one launch to the next.
struct State {
  Gamma gamma;
  PointChange change;
};

__device__ __forceinline__ void follow(const Plan& plan, const Statistics& s, State* state) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    switch (plan.next[k]) {
      case Next::kNothing:
        break;
      case Next::kStretch:
        state->change = stretching(s, plan.contrast);
        break;
      case Next::kRestore: {
        const Gamma gamma = restoring(state->gamma, plan.sign[k], s);
        state->gamma = gamma;
        state->change = {PointChange::kLinear, gamma.scale, gamma.shift, 0, 0, 0, 0};
        break;
      }
      case Next::kRaise:
        if (k == 0) state->gamma = {s, 1.0f, 0.0f};
        state->change = raising(state->gamma, plan.sign[k], plan.exponent);
        break;
    }
  }
}

__device__ __forceinline__ float change_point(const PointChange& change, float x) {
  if (change.kind == PointChange::kNothing) return x;
  const float u = __fadd_rn(__fmul_rn(x, change.scale), change.shift);
  if (change.kind == PointChange::kLinear) return u;
  if (change.kind == PointChange::kStretch) return fminf(fmaxf(u, change.low), change.high);
  const float base = fminf((u - change.low) / change.width, 1.0f);
  return base < 0x1p-126f ? 0.0f : powf(base, change.exponent);
}

// The function comes by value, or where it follows from statistics from the device.
struct Pass {
  const float* from;
  float* to;
  int64_t count;
  PointChange change;
  const State* state;  // nullptr: `change`
};

struct Measuring {
  DeviceTotals* partials;
  unsigned* counter;  // 0 before and after
  State* state;
  Plan plan;

  __device__ __forceinline__ void finish(DeviceTotals totals, int64_t count) const {
    if (!grid_total(totals, partials, counter)) return;
    *counter = 0;
    const Totals all{-value_of(totals.negated), value_of(totals.largest), totals.sum,
                     totals.squares};
    follow(plan, statistics_of(all, count), state);
  }
};

__device__ __forceinline__ int64_t first_voxel() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t voxel_stride() {
  return static_cast<int64_t>(gridDim.x) * kThreads;
}

template <bool kMeasures>
__global__ void __launch_bounds__(kThreads) change_kernel(Pass pass, Measuring measuring) {
  const PointChange change = pass.state == nullptr ? pass.change : pass.state->change;
  DeviceTotals totals{};
  for (int64_t e = first_voxel(); e < pass.count; e += voxel_stride()) {
    const float y = change_point(change, pass.from[e]);
    if (pass.to != nullptr) pass.to[e] = y;
    if (kMeasures) totals.add(y);
  }
  if (kMeasures) measuring.finish(totals, pass.count);
}

// --- noise ---

__device__ __forceinline__ void philox(unsigned (&word)[4], uint64_t seed) {
  auto key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{word[0]} * 0xd2511f53u, second = uint64_t{word[2]} * 0xcd9e8d57u;
    word[0] = static_cast<unsigned>(second >> 32) ^ word[1] ^ key0;
    word[1] = static_cast<unsigned>(second);
    word[2] = static_cast<unsigned>(first >> 32) ^ word[3] ^ key1;
    word[3] = static_cast<unsigned>(first);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

__device__ __forceinline__ void box_muller(unsigned radius_word, unsigned angle_word, float* first,
                                           float* second) {
  const float uniform = (static_cast<float>(radius_word >> 8) + 1.0f) * 0x1p-24f;
  const float radius = sqrtf(-2.0f * logf(uniform));
  const float turn = static_cast<float>(angle_word >> 8) * 0x1p-22f;  // quarters
  const float quarter = rintf(turn), x = (turn - quarter) * 1.57079632679489662f;
  const float square = x * x;  // sinf and cosf keep a table on the stack for angles that are none of these
  const float sine =
      x + x * square * ((square * -1.9515295891e-4f + 8.3321608736e-3f) * square - 1.6666654611e-1f);
  const float cosine =
      1.0f - square * 0.5f +
      square * square *
          ((square * 2.443315711809948e-5f - 1.388731625493765e-3f) * square + 4.166664568298827e-2f);
  const int q = static_cast<int>(quarter);
  const float c = (q & 1) != 0 ? sine : cosine, s = (q & 1) != 0 ? cosine : sine;
  *first = radius * (((q + 1) & 2) != 0 ? -c : c);
  *second = radius * ((q & 2) != 0 ? -s : s);
}

__global__ void __launch_bounds__(kThreads)
    noise_kernel(float* voxels, int64_t count, float sigma, uint64_t seed, unsigned channel) {
  const int64_t counters = divide_up(count, kNoiseBlock) * kNoiseLanes;
  for (int64_t index = first_voxel(); index < counters; index += voxel_stride()) {
    unsigned word[4] = {static_cast<unsigned>(index), 0, channel, 0};
    philox(word, seed);
    float normal[4];
    box_muller(word[0], word[1], &normal[0], &normal[1]);
    box_muller(word[2], word[3], &normal[2], &normal[3]);
    const int64_t first = index / kNoiseLanes * kNoiseBlock + index % kNoiseLanes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t at = first + k * kNoiseLanes;
      if (at < count) voxels[at] += normal[k] * sigma;
    }
  }
}

// --- filter ---

struct AxisFilter {
  float tap[kMaxTaps];
  int radius;
  int64_t size, stride;  // of the axis
};

__global__ void __launch_bounds__(kThreads)
    filter_kernel(const float* from, float* to, int64_t count, AxisFilter filter) {
  const int64_t period = filter.size > 1 ? 2 * (filter.size - 1) : 1;
  for (int64_t e = first_voxel(); e < count; e += voxel_stride()) {
    const int64_t place = e / filter.stride % filter.size;
    const float* line = from + e - place * filter.stride;
    float sum = 0.0f;
    for (int k = -filter.radius; k <= filter.radius; ++k) {
      int64_t at = (place + k) % period;  // folds back at the borders
      at = at < 0 ? at + period : at;
      at = at < filter.size ? at : period - at;
      sum = fmaf(line[at * filter.stride], filter.tap[k + filter.radius], sum);
    }
    to[e] = sum;
  }
}

// --- low resolution ---

struct Resizing {
  int64_t shape[3], small[3];
  bool mirrored[3];
};

// torch's nearest-exact.
__device__ __forceinline__ int64_t nearest_voxel(const Resizing& r, int axis, int64_t place) {
  const float scale = static_cast<float>(r.shape[axis]) / static_cast<float>(r.small[axis]);
  const auto at = static_cast<int64_t>((static_cast<float>(place) + 0.5f) * scale);
  const int64_t voxel = at < r.shape[axis] ? at : r.shape[axis] - 1;
  return r.mirrored[axis] ? r.shape[axis] - 1 - voxel : voxel;
}

__global__ void __launch_bounds__(kThreads)
    thin_kernel(const float* from, float* small, Resizing r, const State* state) {
  PointChange change{};
  if (state != nullptr) change = state->change;
  const int64_t count = r.small[0] * r.small[1] * r.small[2];
  for (int64_t e = first_voxel(); e < count; e += voxel_stride()) {
    const int64_t z = nearest_voxel(r, 0, e / (r.small[1] * r.small[2]));
    const int64_t y = nearest_voxel(r, 1, e / r.small[2] % r.small[1]);
    const int64_t x = nearest_voxel(r, 2, e % r.small[2]);
    small[e] = change_point(change, from[(z * r.shape[1] + y) * r.shape[2] + x]);
  }
}

// Neighbours in the small image and the second one's share: torch's trilinear interpolation.
struct Between {
  int64_t first, next;
  float share;
};

__device__ __forceinline__ Between find_between(const Resizing& r, int axis, int64_t voxel) {
  const float scale = static_cast<float>(r.small[axis]) / static_cast<float>(r.shape[axis]);
  const int64_t at = r.mirrored[axis] ? r.shape[axis] - 1 - voxel : voxel;
  const float place = __fmul_rn(static_cast<float>(at) + 0.5f, scale) - 0.5f;
  const float inside = fmaxf(place, 0.0f);
  const auto floor = static_cast<int64_t>(inside);
  const int64_t last = r.small[axis] - 1, first = floor < last ? floor : last;
  return {first, first < last ? first + 1 : last, inside - static_cast<float>(first)};
}

__device__ __forceinline__ float blend(float a, float b, float share) {
  return fmaf(b, share, a * (1.0f - share));
}

__device__ __forceinline__ float blend_row(const float* row, const Between& x) {
  return blend(row[x.first], row[x.next], x.share);
}

template <bool kMeasures>
__global__ void __launch_bounds__(kThreads)
    enlarge_kernel(const float* small, float* to, Resizing r, Measuring measuring) {
  const int64_t count = r.shape[0] * r.shape[1] * r.shape[2];
  DeviceTotals totals{};
  for (int64_t e = first_voxel(); e < count; e += voxel_stride()) {
    const Between z = find_between(r, 0, e / (r.shape[1] * r.shape[2]));
    const Between y = find_between(r, 1, e / r.shape[2] % r.shape[1]);
    const Between x = find_between(r, 2, e % r.shape[2]);
    float planes[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* plane = small + (k == 0 ? z.first : z.next) * r.small[1] * r.small[2];
      const float a = blend_row(plane + y.first * r.small[2], x);
      planes[k] = blend(a, blend_row(plane + y.next * r.small[2], x), y.share);
    }
    const float value = blend(planes[0], planes[1], z.share);
    to[e] = value;
    if (kMeasures) totals.add(value);
  }
  if (kMeasures) measuring.finish(totals, count);
}

}  // namespace
}  // namespace cuda
}  // namespace fedcmt
