// d = sum_i weights[i] * rows[i]; m = beta * m + d; params += lr * m; one pass.
//
// Up to 8 rows use an unrolled kernel, up to 256 rows a loop over rows in the same launch. More
// rows are taken 256 at a time, with d kept in the workspace between launches: the additions and
// their order are the same. Blocks write partial sums that a last kernel adds in a fixed order.
#include <algorithm>

#include "device.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kMaxUnrolledRows = 8;
constexpr int kMaxRows = 256;  // 12 bytes each; kernel arguments hold 4 KiB
constexpr int64_t kElementsABlock = 2048;

struct WeightedRows {
  const void* pointer[kMaxRows];
  float weight[kMaxRows];
};

struct StepBuffers {
  float* params;
  float* momentum;    // or nullptr
  float* combined;    // d between launches; nullptr when one launch takes all rows
  double* squares;    // [blocks]
  int64_t* nonfinite;  // [blocks]
  int64_t length;
  float lr;
  float beta;
};

// Which launch of a chain this is; a single launch is both first and last.
struct Position {
  bool first, last;
};

// kRows: number of rows when known at compile time, else 0 and num_rows counts.
template <typename T, int kRows, bool kAligned>
__device__ __forceinline__ void add_rows(const WeightedRows& rows, int num_rows, int64_t e,
                                         int64_t length, float* d) {
  constexpr int kSize = Packet<T>::kSize;
  const int count = kRows > 0 ? kRows : num_rows;
#pragma unroll(kRows > 0 ? kRows : 4)
  for (int i = 0; i < count; ++i) {
    const Packet<T> packet =
        load_packet<T, kAligned>(static_cast<const T*>(rows.pointer[i]), e, length);
#pragma unroll
    for (int k = 0; k < kSize; ++k) d[k] = fmaf(rows.weight[i], to_float(packet.value[k]), d[k]);
  }
}

template <bool kAligned, int kSize>
__device__ __forceinline__ void load_floats(const float* from, int64_t e, int64_t length,
                                            float* to) {
#pragma unroll
  for (int k = 0; k < kSize; k += 4) {
    const Packet<float> packet = load_packet<float, kAligned>(from, e + k, length);
#pragma unroll
    for (int q = 0; q < 4; ++q) to[k + q] = packet.value[q];
  }
}

template <bool kAligned, int kSize>
__device__ __forceinline__ void store_floats(const float* from, int64_t e, int64_t length,
                                             float* to) {
#pragma unroll
  for (int k = 0; k < kSize; k += 4) {
    if (kAligned && e + k + 4 <= length) {
      *reinterpret_cast<float4*>(to + e + k) =
          make_float4(from[k], from[k + 1], from[k + 2], from[k + 3]);
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (e + k + q < length) to[e + k + q] = from[k + q];
      }
    }
  }
}

template <typename T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    server_step_kernel(WeightedRows rows, int num_rows, StepBuffers buffers, Position position) {
  constexpr int kSize = Packet<T>::kSize;
  const int64_t length = buffers.length;
  double squares = 0.0;
  long long nonfinite = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  for (; e < length; e += stride) {
    float d[kSize] = {}, m[kSize], x[kSize];
    if (!position.first) load_floats<true, kSize>(buffers.combined, e, length, d);
    add_rows<T, kRows, kAligned>(rows, num_rows, e, length, d);
    if (!position.last) {
      store_floats<true, kSize>(d, e, length, buffers.combined);
      continue;
    }
    // With beta 0 the old momentum is not read: 0 * inf must not poison the step.
    const bool accumulate = buffers.momentum != nullptr && buffers.beta != 0.0f;
    if (accumulate) load_floats<kAligned, kSize>(buffers.momentum, e, length, m);
    load_floats<kAligned, kSize>(buffers.params, e, length, x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      nonfinite += !isfinite(d[k]);
      m[k] = accumulate ? fmaf(buffers.beta, m[k], d[k]) : d[k];
      x[k] = fmaf(buffers.lr, m[k], x[k]);
      squares = fma(static_cast<double>(m[k]), static_cast<double>(m[k]), squares);
    }
    if (buffers.momentum != nullptr) {
      store_floats<kAligned, kSize>(m, e, length, buffers.momentum);
    }
    store_floats<kAligned, kSize>(x, e, length, buffers.params);
  }
  if (!position.last) return;
  FEDCMT_SHARED(double, warp_squares, [kWarps]);
  FEDCMT_SHARED(long long, warp_nonfinite, [kWarps]);
  squares = block_sum(squares, warp_squares);
  nonfinite = block_sum(nonfinite, warp_nonfinite);
  if (threadIdx.x == 0) {
    buffers.squares[blockIdx.x] = squares;
    buffers.nonfinite[blockIdx.x] = nonfinite;
  }
}

__global__ void __launch_bounds__(kThreads)
    server_step_finish(StepBuffers buffers, int blocks, double* __restrict__ sums) {
  FEDCMT_SHARED(double, warp_squares, [kWarps]);
  FEDCMT_SHARED(long long, warp_nonfinite, [kWarps]);
  double squares = 0.0;
  long long nonfinite = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    squares += buffers.squares[b];
    nonfinite += buffers.nonfinite[b];
  }
  squares = block_sum(squares, warp_squares);
  nonfinite = block_sum(nonfinite, warp_nonfinite);
  if (threadIdx.x == 0) {
    sums[0] = squares;
    sums[1] = static_cast<double>(nonfinite);
  }
}

struct Launch {
  WeightedRows rows;
  int num_rows;
  StepBuffers buffers;
  Position position;
  bool aligned;
  int blocks;
  cudaStream_t stream;
};

template <typename T, int kRows>
void launch_unrolled(const Launch& launch) {
  if (launch.aligned) {
    FEDCMT_LAUNCH((server_step_kernel<T, kRows, true>), launch.blocks, kThreads, launch.stream,
                  launch.rows, launch.num_rows, launch.buffers, launch.position);
  } else {
    FEDCMT_LAUNCH((server_step_kernel<T, kRows, false>), launch.blocks, kThreads, launch.stream,
                  launch.rows, launch.num_rows, launch.buffers, launch.position);
  }
}

template <typename T, int kRows = 1>
void launch_rows(const Launch& launch) {
  if constexpr (kRows <= kMaxUnrolledRows) {
    if (launch.num_rows == kRows) return launch_unrolled<T, kRows>(launch);
    return launch_rows<T, kRows + 1>(launch);
  } else {
    launch_unrolled<T, 0>(launch);
  }
}

int64_t combined_bytes(int num_updates, int64_t length) {
  return num_updates > kMaxRows ? (length * 4 + 15) / 16 * 16 : 0;
}

Launch make_launch(const StepArguments& step, const StepBuffers& buffers, int first, int blocks,
                   cudaStream_t stream) {
  const int num_rows = std::min(kMaxRows, step.num_updates - first);
  Launch launch{{},
                num_rows,
                buffers,
                {first == 0, first + num_rows == step.num_updates},
                is_aligned(step.params) && is_aligned(step.momentum),
                blocks,
                stream};
  for (int i = 0; i < num_rows; ++i) {
    launch.rows.pointer[i] = step.updates[first + i];
    launch.rows.weight[i] = step.weights[first + i];
    launch.aligned = launch.aligned && is_aligned(launch.rows.pointer[i]);
  }
  return launch;
}

}  // namespace

// combined [P] float32 for more than kMaxRows rows, then squares and nonfinite [blocks] each.
int64_t server_step_workspace_bytes(int num_updates, int64_t length) {
  return combined_bytes(num_updates, length) + 16 * count_grid_blocks(length, kElementsABlock);
}

int server_step(const StepArguments& step, void* workspace, double* sums, int device,
                void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int blocks = static_cast<int>(count_grid_blocks(step.length, kElementsABlock));
  const int64_t combined = combined_bytes(step.num_updates, step.length);
  double* squares = reinterpret_cast<double*>(static_cast<char*>(workspace) + combined);
  const StepBuffers buffers{step.params,
                            step.momentum,
                            combined > 0 ? static_cast<float*>(workspace) : nullptr,
                            squares,
                            reinterpret_cast<int64_t*>(squares + blocks),
                            step.length,
                            step.lr,
                            step.beta};
  const auto on_stream = static_cast<cudaStream_t>(stream);
  for (int first = 0; first < step.num_updates; first += kMaxRows) {
    const Launch launch = make_launch(step, buffers, first, blocks, on_stream);
    switch (step.dtype) {
      case Dtype::kFloat32:
        launch_rows<float>(launch);
        break;
      case Dtype::kBFloat16:
        launch_rows<__nv_bfloat16>(launch);
        break;
      case Dtype::kFloat16:
        launch_rows<__half>(launch);
        break;
    }
  }
  FEDCMT_LAUNCH(server_step_finish, 1, kThreads, on_stream, buffers, blocks, sums);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace fedcmt
