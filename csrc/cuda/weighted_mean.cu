// Weighted sums of several groups of rows in one launch: every group has rows, weights, a dtype and
// a length of its own.
#include "pieces.cuh"
#include "tables.cuh"

namespace fedcmt {
namespace cuda {
namespace {

struct DeviceTask {
  float* out;
  const void* const* rows;  // [count]
  const float* weights;     // [count]
  int64_t length;
  int count;
  Dtype dtype;
  bool aligned;
};

template <typename T, bool kWide>
__device__ __forceinline__ void mean_packet(const DeviceTask& task, int64_t e,
                                            const Range& range) {
  constexpr int kSize = Packet<T>::kSize;
  float sum[kSize] = {};
#pragma unroll 4
  for (int i = 0; i < task.count; ++i) {
    const T* row = static_cast<const T*>(task.rows[i]);
    const float weight = __ldg(task.weights + i);
    const Packet<T> packet = load_row<kWide>(row, e, range);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[k] = fmaf(weight, to_float(packet.value[k]), sum[k]);
  }
  store_floats<kWide, kSize>(sum, task.out, e, range);
}

template <typename T>
__device__ __forceinline__ void mean_piece(const DeviceTask& task, const Range& range) {
  constexpr int kSize = Packet<T>::kSize;
  int64_t e = range.begin + static_cast<int64_t>(threadIdx.x) * kSize;
  if (task.aligned) {
    for (; e + kSize <= range.end; e += kThreads * kSize) mean_packet<T, true>(task, e, range);
  }
  for (; e < range.end; e += kThreads * kSize) mean_packet<T, false>(task, e, range);
}

// pieces: [gridDim.x]; the segment of a piece is its task.
__global__ void __launch_bounds__(kThreads)
    weighted_mean_kernel(const DeviceTask* __restrict__ tasks, const Piece* __restrict__ pieces) {
  const Piece piece = pieces[blockIdx.x];
  const DeviceTask task = tasks[piece.segment];
  switch (task.dtype) {
    case Dtype::kFloat32:
      return mean_piece<float>(task, piece.range);
    case Dtype::kBFloat16:
      return mean_piece<__nv_bfloat16>(task, piece.range);
    case Dtype::kFloat16:
      return mean_piece<__half>(task, piece.range);
  }
}

std::vector<Piece> cut_tasks(const std::vector<MeanTask>& tasks) {
  int64_t total = 0;
  for (const MeanTask& task : tasks) total += task.rows.length;
  const int64_t piece_length = choose_piece_length(total);
  std::vector<Piece> pieces;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t length = tasks[t].rows.length;
    for (int64_t begin = 0; begin < length; begin += piece_length) {
      const int64_t end = std::min(begin + piece_length, length);
      pieces.push_back({{begin, end}, static_cast<int64_t>(t)});
    }
  }
  return pieces;
}

// All that the launch reads; `workspace` is where it will lie on the device.
struct MeanWorkspace {
  MeanWorkspace(const std::vector<MeanTask>& tasks, void* workspace) : pieces(cut_tasks(tasks)) {
    std::vector<DeviceTask> device_tasks;
    for (const MeanTask& task : tasks) {
      const Rows& rows = task.rows;
      const int64_t pointers = tables.add(rows.pointer, rows.count);
      const int64_t weights = tables.add(task.weights, rows.count);
      device_tasks.push_back({task.out, at<const void* const>(workspace, pointers),
                              at<const float>(workspace, weights), rows.length, rows.count,
                              rows.dtype, are_aligned(rows) && is_aligned(task.out)});
    }
    task_table = tables.add(device_tasks);
    piece_table = tables.add(pieces);
  }

  std::vector<Piece> pieces;
  Tables tables;
  int64_t task_table, piece_table;
};

}  // namespace

int64_t weighted_mean_workspace_bytes(const std::vector<MeanTask>& tasks) {
  return MeanWorkspace(tasks, nullptr).tables.bytes();
}

int weighted_mean(const std::vector<MeanTask>& tasks, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const MeanWorkspace space(tasks, launch.workspace);
  if (space.pieces.empty()) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t uploaded = space.tables.upload(launch.workspace, stream);
  if (uploaded != cudaSuccess) return uploaded;
  FEDCMT_RUN(weighted_mean_kernel, static_cast<unsigned>(space.pieces.size()), kThreads, stream,
             at<const DeviceTask>(launch.workspace, space.task_table),
             at<const Piece>(launch.workspace, space.piece_table));
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
