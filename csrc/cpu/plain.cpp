// The path every processor can run: 128-bit vectors of the compiler (SSE2, NEON or scalar code),
// products and sums rounded separately since a baseline x86-64 has no fused multiply-add.
#include "block_kernels.h"

namespace fedcmt {
namespace cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
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
  int count_nonfinite() const {
    // x - x is 0 for finite x and NaN otherwise; a true comparison is -1 in its lane.
    const Float4 difference = v - v;
    const auto nonfinite = difference != difference;
    return -static_cast<int>(nonfinite[0] + nonfinite[1] + nonfinite[2] + nonfinite[3]);
  }
  void add_squares(Doubles sums[2]) const {
    const Double2 low = {v[0], v[1]}, high = {v[2], v[3]};
    sums[0].v += low * low;
    sums[1].v += high * high;
  }
};

inline Floats fma(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }

#include "block_kernels_impl.h"

}  // namespace

const BlockKernels kPlainKernels = {"plain", gramian_block, server_step_block};

}  // namespace cpu
}  // namespace fedcmt
