// AVX-512 path (F, BW, VL, DQ). See block_kernels.h for what this file must not contain.
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

constexpr int kTile = 4;

struct Doubles {
  static constexpr int kLanes = 8;
  __m512d v;

  static Doubles zero() { return {_mm512_setzero_pd()}; }
  static Doubles load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  static Doubles widen(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Doubles widen(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i shifted = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(shifted))};
  }
  static Doubles widen(const Float16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(bits))};
  }
};

inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

struct Floats {
  static constexpr int kLanes = 16;
  __m512 v;

  static Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Floats load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));  // to nearest even
    __m512i rounded = _mm512_add_epi32(bits, half);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  __mmask16 nonfinite() const {
    constexpr int kNanOrInfinity = 0x99;  // quiet NaN, signalling NaN, +inf, -inf
    return _mm512_fpclass_ps_mask(v, kNanOrInfinity);
  }
  int count_nonfinite() const { return __builtin_popcount(nonfinite()); }
  Floats finite_or_zero() const { return {_mm512_mask_mov_ps(v, nonfinite(), _mm512_setzero_ps())}; }
  Floats absolute() const { return {_mm512_abs_ps(v)}; }
  Floats sqrt() const { return {_mm512_sqrt_ps(v)}; }
  // This value where the other is positive, its negative where negative, 0 where that is 0.
  Floats times_sign(Floats other) const {
    const __m512 sign = _mm512_and_ps(other.v, _mm512_set1_ps(-0.0f));
    const __mmask16 zero = _mm512_cmp_ps_mask(other.v, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return {_mm512_mask_mov_ps(_mm512_xor_ps(v, sign), zero, _mm512_setzero_ps())};
  }
  void add_squares(Doubles sums[2]) const {
    const Doubles low = {_mm512_cvtps_pd(_mm512_castps512_ps256(v))};
    const Doubles high = {_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
    sums[0].v = _mm512_fmadd_pd(low.v, low.v, sums[0].v);
    sums[1].v = _mm512_fmadd_pd(high.v, high.v, sums[1].v);
  }
};

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Even elements, then odd ones: a shift and a mask instead of two shuffles and two shifts.
inline void load_two(const BFloat16* p, float* out) {
  const __m512i bits = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000));
  _mm512_storeu_si512(out, _mm512_slli_epi32(bits, 16));
  _mm512_storeu_si512(out + Floats::kLanes, odd);
}

#include "lanes_impl.h"

// Two neighbours each: one access of 8 bytes instead of two of 4.
inline void gather_two(const float* from, IntVector index, FloatVector* first, FloatVector* second) {
  const __m512i lanes = (__m512i)index;
  const __m512d low = _mm512_i32gather_pd(_mm512_castsi512_si256(lanes), from, 4);
  const __m512d high = _mm512_i32gather_pd(_mm512_extracti64x4_epi64(lanes, 1), from, 4);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  *first = (FloatVector)_mm512_permutex2var_ps(_mm512_castpd_ps(low), even, _mm512_castpd_ps(high));
  *second = (FloatVector)_mm512_permutex2var_ps(_mm512_castpd_ps(low), odd, _mm512_castpd_ps(high));
}

// The label in the low half of a lane, its neighbour in the high one.
inline IntVector gather_labels(const int16_t* from, IntVector index) {
  return (IntVector)_mm512_i32gather_epi32((__m512i)index, from, 2);
}

inline bool all_true(IntVector mask) { return _mm512_movepi32_mask((__m512i)mask) == 0xffff; }

// High halves of the unsigned products.
inline UintVector multiply_high(UintVector a, uint32_t factor) {
  const __m512i x = (__m512i)a, f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x, f), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
  return (UintVector)_mm512_mask_blend_epi32(0xaaaa, even, odd);
}

#include "block_kernels_impl.h"

}  // namespace

const BlockKernels kAvx512Kernels = {
    "avx512", gramian_block, gramian_row_block, server_step_block, weighted_sum_block, screen_block,
    warp_rows,     &kIntensityKernels, instance_norm_block,
};

}  // namespace cpu
}  // namespace fedcmt
