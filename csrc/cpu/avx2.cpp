// AVX2 path (with FMA and F16C). See block_kernels.h for what this file must not contain.
#include <immintrin.h>

#include "block_kernels.h"

namespace fedcmt {
namespace cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kTile = 3;  // 9 accumulators and 4 operands fit the 16 registers

struct Doubles {
  static constexpr int kLanes = 4;
  __m256d v;

  static Doubles zero() { return {_mm256_setzero_pd()}; }
  static Doubles load(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  static Doubles widen(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static Doubles widen(const BFloat16* p) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i shifted = _mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16);
    return {_mm256_cvtps_pd(_mm_castsi128_ps(shifted))};
  }
  static Doubles widen(const Float16* p) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtps_pd(_mm_cvtph_ps(bits))};
  }
};

inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

struct Floats {
  static constexpr int kLanes = 8;
  __m256 v;

  static Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Floats load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Floats load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));  // to nearest even
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet =
        _mm256_srli_epi32(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  __m256 nonfinite() const {
    // x - x is 0 for finite x and NaN otherwise.
    const __m256 difference = _mm256_sub_ps(v, v);
    return _mm256_cmp_ps(difference, difference, _CMP_UNORD_Q);
  }
  int count_nonfinite() const { return __builtin_popcount(_mm256_movemask_ps(nonfinite())); }
  Floats finite_or_zero() const { return {_mm256_andnot_ps(nonfinite(), v)}; }
  Floats absolute() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  Floats sqrt() const { return {_mm256_sqrt_ps(v)}; }
  // This value where the other is positive, its negative where negative, 0 where that is 0.
  Floats times_sign(Floats other) const {
    const __m256 sign = _mm256_and_ps(other.v, _mm256_set1_ps(-0.0f));
    const __m256 zero = _mm256_cmp_ps(other.v, _mm256_setzero_ps(), _CMP_EQ_OQ);
    return {_mm256_andnot_ps(zero, _mm256_xor_ps(v, sign))};
  }
  void add_squares(Doubles sums[2]) const {
    const Doubles low = {_mm256_cvtps_pd(_mm256_castps256_ps128(v))};
    const Doubles high = {_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
    sums[0].v = _mm256_fmadd_pd(low.v, low.v, sums[0].v);
    sums[1].v = _mm256_fmadd_pd(high.v, high.v, sums[1].v);
  }
};

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// Even elements, then odd ones: a shift and a mask instead of two shuffles and two shifts.
inline void load_two(const BFloat16* p, float* out) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi32(bits, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + Floats::kLanes), odd);
}

#include "lanes_impl.h"

// Two neighbours each: one access of 8 bytes instead of two of 4.
inline void gather_two(const float* from, IntVector index, FloatVector* first, FloatVector* second) {
  const __m256i lanes = (__m256i)index;
  const auto* pairs = reinterpret_cast<const double*>(from);
  const __m256 low = _mm256_castpd_ps(_mm256_i32gather_pd(pairs, _mm256_castsi256_si128(lanes), 4));
  const __m256 high = _mm256_castpd_ps(_mm256_i32gather_pd(pairs, _mm256_extracti128_si256(lanes, 1), 4));
  const __m256 even = _mm256_shuffle_ps(low, high, 0x88), odd = _mm256_shuffle_ps(low, high, 0xdd);
  *first = (FloatVector)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  *second = (FloatVector)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
}

// The label in the low half of a lane, its neighbour in the high one.
inline IntVector gather_labels(const int16_t* from, IntVector index) {
  return (IntVector)_mm256_i32gather_epi32(reinterpret_cast<const int*>(from), (__m256i)index, 2);
}

inline bool all_true(IntVector mask) { return _mm256_movemask_ps((__m256)mask) == 0xff; }

// High halves of the unsigned products.
inline UintVector multiply_high(UintVector a, uint32_t factor) {
  const __m256i x = (__m256i)a, f = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, f), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
  return (UintVector)_mm256_blend_epi32(even, odd, 0xaa);
}

#include "block_kernels_impl.h"

}  // namespace

const BlockKernels kAvx2Kernels = {
    "avx2", gramian_block, gramian_row_block, server_step_block, weighted_sum_block, screen_block,
    warp_rows,     &kIntensityKernels, instance_norm_block,
};

}  // namespace cpu
}  // namespace fedcmt
