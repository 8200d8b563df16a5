// The path every processor can run: 128-bit vectors of the compiler (SSE2, NEON or scalar code),
// products and sums rounded separately since a baseline x86-64 has no fused multiply-add.
#include "block_kernels.h"

namespace fedcmt {
namespace cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Mask4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction x 2^-24, exact in float32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + (127 - 15);
  return from_bits(sign | (wide << 23) | (fraction << 13));
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Rounds away the low bits of a magnitude, to nearest even.
inline uint32_t round_bits(uint32_t magnitude, int bits) {
  return (magnitude + (1u << (bits - 1)) - 1 + ((magnitude >> bits) & 1)) >> bits;
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, BFloat16* to) {
  const uint32_t bits = to_bits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : round_bits(bits, 16));
}
inline void from_float(float x, Float16* to) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more; what rounds up to it comes out below
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: 2^-14 and more
    half = round_bits(magnitude - ((127u - 15u) << 23), 13);
  } else {  // adding 0.5 makes float32 round to multiples of 2^-24, the subnormals
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  }
  to->bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

constexpr int kTile = 3;

struct Doubles {
  static constexpr int kLanes = 2;
  Double2 v;

  static Doubles zero() { return {Double2{0.0, 0.0}}; }
  static Doubles load(const double* p) { return {Double2{p[0], p[1]}}; }
  void store(double* p) const {
    p[0] = v[0];
    p[1] = v[1];
  }
  template <typename T>
  static Doubles widen(const T* p) {
    return {Double2{to_float(p[0]), to_float(p[1])}};
  }
};

inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {a.v * b.v + c.v}; }

struct Floats {
  static constexpr int kLanes = 4;
  Float4 v;

  static Floats broadcast(float x) { return {Float4{x, x, x, x}}; }
  template <typename T>
  static Floats load(const T* p) {
    return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
  template <typename T>
  void store(T* p) const {
    for (int k = 0; k < kLanes; ++k) from_float(v[k], p + k);
  }
  Mask4 nonfinite() const {
    // x - x is 0 for finite x and NaN otherwise; a true comparison is -1 in its lane.
    const Float4 difference = v - v;
    return difference != difference;
  }
  int count_nonfinite() const {
    const Mask4 mask = nonfinite();
    return -static_cast<int>(mask[0] + mask[1] + mask[2] + mask[3]);
  }
  Floats finite_or_zero() const { return {nonfinite() ? Float4{} : v}; }
  Floats absolute() const { return {v < 0.0f ? -v : v}; }
  Floats sqrt() const {
    Float4 root = v;
    for (int k = 0; k < kLanes; ++k) root[k] = __builtin_sqrtf(v[k]);
    return {root};
  }
  // This value where the other is positive, its negative where negative, 0 where that is 0.
  Floats times_sign(Floats other) const {
    const Float4 signed_value = other.v < 0.0f ? -v : v;
    return {other.v == 0.0f ? Float4{} : signed_value};
  }
  void add_squares(Doubles sums[2]) const {
    const Double2 low = {v[0], v[1]}, high = {v[2], v[3]};
    sums[0].v += low * low;
    sums[1].v += high * high;
  }
};

inline Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
inline Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
inline Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
inline Floats operator/(Floats a, Floats b) { return {a.v / b.v}; }
inline Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }

#include "lanes_impl.h"

inline void gather_two(const float* from, IntVector index, FloatVector* first, FloatVector* second) {
  for (int k = 0; k < kVectorLanes; ++k) {
    (*first)[k] = from[index[k]];
    (*second)[k] = from[index[k] + 1];
  }
}

// The label in the low half of a lane, its neighbour in the high one.
inline IntVector gather_labels(const int16_t* from, IntVector index) {
  IntVector two;
  for (int k = 0; k < kVectorLanes; ++k) {
    const auto low = static_cast<uint16_t>(from[index[k]]), high = static_cast<uint16_t>(from[index[k] + 1]);
    two[k] = static_cast<int32_t>(uint32_t{high} << 16 | low);
  }
  return two;
}

inline bool all_true(IntVector mask) { return (mask[0] & mask[1] & mask[2] & mask[3]) != 0; }

// High halves of the unsigned products.
inline UintVector multiply_high(UintVector a, uint32_t factor) {
  for (int k = 0; k < kVectorLanes; ++k) a[k] = static_cast<uint32_t>((uint64_t{a[k]} * factor) >> 32);
  return a;
}

#include "block_kernels_impl.h"

}  // namespace

const BlockKernels kPlainKernels = {
    "plain", gramian_block, gramian_row_block, server_step_block, weighted_sum_block, screen_block,
    warp_rows,     &kIntensityKernels, instance_norm_block,
};

}  // namespace cpu
}  // namespace fedcmt
