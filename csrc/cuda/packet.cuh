// Loads and stores of 16 bytes of a row, and the conversions of its elements.
//
// Every kernel walks over the same places whether its rows are aligned or not. Where the rows start
// at multiples of 16 bytes and nothing lies outside the range, packets move by wide instructions
// (kWide); otherwise one element at a time. Alignment changes the speed of a result, never a bit.
#pragma once

#include "device.cuh"

namespace fedcmt {
namespace cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// To the nearest value of type To, ties to even. A value that keeps its type keeps its bits.
template <typename To>
struct Rounding;
template <>
struct Rounding<float> {
  template <typename From>
  static __device__ __forceinline__ float round(From x) {
    return to_float(x);
  }
};
template <>
struct Rounding<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 round(__nv_bfloat16 x) { return x; }
  template <typename From>
  static __device__ __forceinline__ __nv_bfloat16 round(From x) {
    return __float2bfloat16_rn(to_float(x));
  }
};
template <>
struct Rounding<__half> {
  static __device__ __forceinline__ __half round(__half x) { return x; }
  template <typename From>
  static __device__ __forceinline__ __half round(From x) {
    return __float2half_rn(to_float(x));
  }
};

template <typename T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Elements that may be touched: [begin, end).
struct Range {
  int64_t begin, end;
};

__device__ __forceinline__ bool contains(const Range& range, int64_t e) {
  return e >= range.begin && e < range.end;
}

template <typename T>
__device__ __forceinline__ Packet<T> load_elements(const T* row, int64_t first,
                                                   const Range& range) {
  Packet<T> packet;
#pragma unroll
  for (int k = 0; k < Packet<T>::kSize; ++k) {
    packet.value[k] = contains(range, first + k) ? row[first + k] : T{};
  }
  return packet;
}

// Elements [first, first + kSize) of a row that no thread of the launch writes; zeros outside the
// range.
template <bool kWide, typename T>
__device__ __forceinline__ Packet<T> load_row(const T* row, int64_t first, const Range& range) {
  if (!kWide) return load_elements(row, first, range);
  Packet<T> packet;
  *reinterpret_cast<uint4*>(&packet) = __ldg(reinterpret_cast<const uint4*>(row + first));
  return packet;
}

// kCount floats of a vector that the launch may also write.
template <bool kWide, int kCount>
__device__ __forceinline__ void load_floats(const float* from, int64_t first, const Range& range,
                                            float* to) {
#pragma unroll
  for (int k = 0; k < kCount; k += 4) {
    Packet<float> packet;
    if (kWide) {
      packet = *reinterpret_cast<const Packet<float>*>(from + first + k);
    } else {
      packet = load_elements(from, first + k, range);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) to[k + q] = packet.value[q];
  }
}

// In one instruction also where the address comes from a table: nvcc takes such an address for a
// generic one and would split the store.
template <typename T>
__device__ __forceinline__ void store_words(uint4 words, T* to) {
#ifdef FEDCMT_SIMULATED
  *reinterpret_cast<uint4*>(to) = words;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#endif
}

template <bool kWide, typename T>
__device__ __forceinline__ void store_packet(const Packet<T>& packet, T* to, int64_t first,
                                             const Range& range) {
  if (kWide) {
    store_words(*reinterpret_cast<const uint4*>(&packet), to + first);
  } else {
#pragma unroll
    for (int k = 0; k < Packet<T>::kSize; ++k) {
      if (contains(range, first + k)) to[first + k] = packet.value[k];
    }
  }
}

template <bool kWide, int kCount>
__device__ __forceinline__ void store_floats(const float* from, float* to, int64_t first,
                                             const Range& range) {
#pragma unroll
  for (int k = 0; k < kCount; k += 4) {
    const Packet<float> packet{{from[k], from[k + 1], from[k + 2], from[k + 3]}};
    store_packet<kWide>(packet, to, first + k, range);
  }
}

}  // namespace cuda
}  // namespace fedcmt
