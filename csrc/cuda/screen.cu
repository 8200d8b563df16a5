// Measures a row while it is copied and, where the dtypes differ, converted.
#include "packet.cuh"
#include "reduce.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kGroupsAStep = 4;  // groups of elements that a thread loads at once

struct ScreenTotals {
  double nonfinite, squares, largest;
};

__device__ __forceinline__ void merge(ScreenTotals& into, const ScreenTotals& from) {
  into.nonfinite += from.nonfinite;
  into.squares += from.squares;
  into.largest = fmax(into.largest, from.largest);
}

__device__ __forceinline__ ScreenTotals shift_down(const ScreenTotals& totals, int offset) {
  return {__shfl_down_sync(kFullWarp, totals.nonfinite, offset),
          __shfl_down_sync(kFullWarp, totals.squares, offset),
          __shfl_down_sync(kFullWarp, totals.largest, offset)};
}

// What one thread has seen.
struct Seen {
  long long nonfinite;
  double squares;
  float largest;

  __device__ __forceinline__ void add(float x) {
    const bool finite = isfinite(x);
    const float value = finite ? x : 0.0f;
    nonfinite += !finite;
    squares = fma(static_cast<double>(value), static_cast<double>(value), squares);
    largest = fmaxf(largest, fabsf(value));
  }
};

// A group fills at least one packet of either dtype.
template <typename From, typename To>
struct Group {
  static constexpr int kSize =
      Packet<From>::kSize > Packet<To>::kSize ? Packet<From>::kSize : Packet<To>::kSize;
  static constexpr int kFrom = kSize / Packet<From>::kSize;
  static constexpr int kTo = kSize / Packet<To>::kSize;
  Packet<From> from[kFrom];

  template <bool kWide>
  __device__ __forceinline__ void load(const From* row, int64_t e, const Range& range) {
#pragma unroll
    for (int p = 0; p < kFrom; ++p) {
      from[p] = load_row<kWide>(row, e + p * Packet<From>::kSize, range);
    }
  }

  // Elements outside the range are zeros, which no total notices.
  template <bool kWide>
  __device__ __forceinline__ void measure_and_store(To* to, int64_t e, const Range& range,
                                                    Seen& seen) const {
#pragma unroll
    for (int p = 0; p < kTo; ++p) {
      Packet<To> packet;
#pragma unroll
      for (int q = 0; q < Packet<To>::kSize; ++q) {
        const int k = p * Packet<To>::kSize + q;
        packet.value[q] =
            Rounding<To>::round(from[k / Packet<From>::kSize].value[k % Packet<From>::kSize]);
        seen.add(to_float(packet.value[q]));
      }
      if (to != nullptr) store_packet<kWide>(packet, to, e + p * Packet<To>::kSize, range);
    }
  }
};

template <bool kWide, typename From, typename To>
__device__ __forceinline__ void screen_step(const From* from, To* to, int64_t e, int64_t length,
                                            Seen& seen) {
  using Part = Group<From, To>;
  constexpr int kPitch = kThreads * Part::kSize;
  const Range range{0, length};
  Part groups[kGroupsAStep];
#pragma unroll
  for (int u = 0; u < kGroupsAStep; ++u) {
    groups[u].template load<kWide>(from, e + u * kPitch, range);
  }
#pragma unroll
  for (int u = 0; u < kGroupsAStep; ++u) {
    groups[u].template measure_and_store<kWide>(to, e + u * kPitch, range, seen);
  }
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    screen_kernel(const From* from, To* to, int64_t length, bool aligned, ScreenTotals* partials,
                  unsigned* counter, double* __restrict__ sums) {
  constexpr int kSize = Group<From, To>::kSize;
  constexpr int kStep = kThreads * kSize * kGroupsAStep;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kStep;
  int64_t begin = static_cast<int64_t>(blockIdx.x) * kStep;
  const int64_t mine = static_cast<int64_t>(threadIdx.x) * kSize;
  Seen seen{0, 0.0, 0.0f};
  if (aligned) {
    for (; begin + kStep <= length; begin += stride) {
      screen_step<true>(from, to, begin + mine, length, seen);
    }
  }
  for (; begin < length; begin += stride) {
    screen_step<false>(from, to, begin + mine, length, seen);
  }
  ScreenTotals totals{static_cast<double>(seen.nonfinite), seen.squares, seen.largest};
  if (grid_total(totals, partials, counter)) {
    sums[0] = totals.nonfinite;
    sums[1] = totals.squares;
    sums[2] = totals.largest;
  }
}

struct ScreenCall {
  ScreenArguments arguments;
  bool aligned;
  unsigned* counter;
  ScreenTotals* partials;
  double* sums;
  cudaStream_t stream;
};

constexpr int64_t kElementsABlock = 4096;
constexpr int64_t kCounterBytes = 256;

int64_t count_blocks(const ScreenArguments& arguments) {
  return count_grid_blocks(arguments.length, kElementsABlock);
}

template <typename From, typename To>
void run_screen(const ScreenCall& call) {
  FEDCMT_RUN((screen_kernel<From, To>), static_cast<unsigned>(count_blocks(call.arguments)),
             kThreads, call.stream, static_cast<const From*>(call.arguments.from),
             static_cast<To*>(call.arguments.to), call.arguments.length, call.aligned,
             call.partials, call.counter, call.sums);
}

template <typename From>
void run_from(const ScreenCall& call) {
  switch (call.arguments.to_dtype) {
    case Dtype::kFloat32:
      return run_screen<From, float>(call);
    case Dtype::kBFloat16:
      return run_screen<From, __nv_bfloat16>(call);
    case Dtype::kFloat16:
      return run_screen<From, __half>(call);
  }
}

}  // namespace

// The counter of finished blocks, then their totals.
int64_t screen_workspace_bytes(const ScreenArguments& arguments) {
  return kCounterBytes + count_blocks(arguments) * static_cast<int64_t>(sizeof(ScreenTotals));
}

int screen(const ScreenArguments& arguments, double* sums, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t zeroed = cudaMemsetAsync(launch.workspace, 0, kCounterBytes, stream);
  if (zeroed != cudaSuccess) return zeroed;
  char* workspace = static_cast<char*>(launch.workspace);
  const ScreenCall call{arguments,
                        is_aligned(arguments.from) && is_aligned(arguments.to),
                        reinterpret_cast<unsigned*>(workspace),
                        reinterpret_cast<ScreenTotals*>(workspace + kCounterBytes),
                        sums,
                        stream};
  switch (arguments.from_dtype) {
    case Dtype::kFloat32:
      run_from<float>(call);
      break;
    case Dtype::kBFloat16:
      run_from<__nv_bfloat16>(call);
      break;
    case Dtype::kFloat16:
      run_from<__half>(call);
      break;
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
