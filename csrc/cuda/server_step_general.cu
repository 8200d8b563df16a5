// The server step of any number of targets, segments and updates.
//
// A block takes one piece of the rows and one group of targets. It reads every row once and keeps
// the group's d in registers, so each value of a row serves the whole group. The groups of a piece
// follow each other in launch order: they run side by side, so that DRAM delivers a row to the
// first of them and the second-level cache to the others.
#include <algorithm>

#include "pieces.cuh"
#include "server_step.cuh"
#include "tables.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kStepThreads = 128;
constexpr int kStepWarps = kStepThreads / 32;

// Targets of a group. d of all of them takes 32 registers of a thread: larger groups would leave
// too few threads to keep the loads of the state in flight.
template <typename T>
constexpr int kWideGroup = 32 / Packet<T>::kSize;

struct StepTables {
  PieceSource pieces;
  const void* const* rows;    // [N]
  const float* weights;       // [S, groups, N, targets of a group], zeros where there is no target
  const StepTarget* targets;  // [M]
  int num_rows, num_targets;
  bool aligned;
};

struct GeneralStep {
  StepTables tables;
  StepRule rule;
  StepTotals* partials;  // [M, pieces]
};

// What a block works on.
struct GroupTask {
  Range range;
  const float* weights;  // [N, kTargets]
  const StepTarget* targets;
  int num_targets;
};

// Wide where it can be: the places in the table are multiples of 16 bytes then.
template <int kTargets>
__device__ __forceinline__ void load_weights(const float* from, float (&weights)[kTargets]) {
  if constexpr (kTargets % 4 == 0) {
#pragma unroll
    for (int t = 0; t < kTargets; t += 4) {
      const Packet<float> quad = load_row<true>(from, t, {});
#pragma unroll
      for (int q = 0; q < 4; ++q) weights[t + q] = quad.value[q];
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTargets; ++t) weights[t] = __ldg(from + t);
  }
}

template <typename T, int kTargets, bool kAdaptive>
struct GroupStep {
  static constexpr int kSize = Packet<T>::kSize;
  static constexpr int kStep = kStepThreads * kSize;
  static constexpr int kQuads = kSize / 4;
  // Registers have no index at run time, shared memory does. Each thread uses its own column.
  using Column = Packet<float>[kTargets][kQuads][kStepThreads];
  using Totals = StepTotals[kTargets][kStepWarps];

  template <bool kWide>
  static __device__ __forceinline__ void combine(const StepTables& tables, const GroupTask& task,
                                                 int64_t e, float (&d)[kTargets][kSize]) {
#pragma unroll 4
    for (int i = 0; i < tables.num_rows; ++i) {
      const T* row = static_cast<const T*>(tables.rows[i]);
      const Packet<T> packet = load_row<kWide>(row, e, task.range);
      float weights[kTargets];
      load_weights(task.weights + i * kTargets, weights);
#pragma unroll
      for (int t = 0; t < kTargets; ++t) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          d[t][k] = fmaf(weights[t], to_float(packet.value[k]), d[t][k]);
        }
      }
    }
  }

  template <bool kWide>
  static __device__ __forceinline__ void run(const GeneralStep& step, const GroupTask& task,
                                             int64_t e, Column& column, Totals& totals) {
    float d[kTargets][kSize] = {};
    combine<kWide>(step.tables, task, e, d);
#pragma unroll
    for (int t = 0; t < kTargets; ++t) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        column[t][q][threadIdx.x] = {
            {d[t][4 * q], d[t][4 * q + 1], d[t][4 * q + 2], d[t][4 * q + 3]}};
      }
    }
#pragma unroll 1
    for (int t = 0; t < task.num_targets; ++t) {
      float mine[kSize];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const Packet<float> quad = column[t][q][threadIdx.x];
#pragma unroll
        for (int k = 0; k < 4; ++k) mine[4 * q + k] = quad.value[k];
      }
      double squares = 0.0;
      int nonfinite = 0;
      step_elements<kSize, kAdaptive, kWide>(step.rule, task.targets[t], mine, e, task.range,
                                             squares, nonfinite);
      const StepTotals seen =
          warp_total(StepTotals{squares, static_cast<double>(nonfinite)});
      if (threadIdx.x % 32 == 0) merge(totals[t][threadIdx.x / 32], seen);
    }
  }
};

template <int kTargets>
__device__ __forceinline__ GroupTask find_task(const StepTables& tables, int groups, int group,
                                               const Piece& piece) {
  const int first = group * kTargets;
  const int rest = tables.num_targets - first;
  return {piece.range,
          tables.weights + (piece.segment * groups + group) * tables.num_rows * kTargets,
          tables.targets + first, rest < kTargets ? rest : kTargets};
}

template <typename T, int kTargets, bool kAdaptive>
__global__ void __launch_bounds__(kStepThreads) general_step_kernel(GeneralStep step) {
  using Group = GroupStep<T, kTargets, kAdaptive>;
  FEDCMT_SHARED(Packet<float>, column, [kTargets][Group::kQuads][kStepThreads]);
  FEDCMT_SHARED(StepTotals, totals, [kTargets][kStepWarps]);
  if (threadIdx.x % 32 == 0) {
    for (int t = 0; t < kTargets; ++t) totals[t][threadIdx.x / 32] = StepTotals{};
  }
  const int groups = static_cast<int>(divide_up(step.tables.num_targets, kTargets));
  const int group = blockIdx.x % groups;
  const int piece_index = blockIdx.x / groups;
  const GroupTask task = find_task<kTargets>(step.tables, groups, group,
                                             find_piece(step.tables.pieces, piece_index));
  const Steps<Group::kStep> steps(task.range);
  const int64_t mine = static_cast<int64_t>(threadIdx.x) * Group::kSize;
  int64_t number = 0;
  if (step.tables.aligned) {
    for (; number < steps.whole; ++number) {
      Group::template run<true>(step, task, steps.start(number) + mine, column, totals);
    }
  }
  for (; number < steps.count(); ++number) {
    Group::template run<false>(step, task, steps.start(number) + mine, column, totals);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= task.num_targets) return;
  StepTotals total = totals[threadIdx.x][0];
  for (int warp = 1; warp < kStepWarps; ++warp) merge(total, totals[threadIdx.x][warp]);
  const int64_t target = group * kTargets + threadIdx.x;
  step.partials[target * (gridDim.x / groups) + piece_index] = total;
}

// One block for each target.
__global__ void __launch_bounds__(kThreads)
    general_step_finish(const StepTotals* __restrict__ partials, int64_t num_pieces,
                        double* __restrict__ sums) {
  FEDCMT_SHARED(StepTotals, warp_totals, [kWarps]);
  const StepTotals* mine = partials + blockIdx.x * num_pieces;
  StepTotals total{};
  for (int64_t p = threadIdx.x; p < num_pieces; p += kThreads) merge(total, mine[p]);
  total = block_total(total, warp_totals);
  if (threadIdx.x == 0) {
    sums[2 * blockIdx.x] = total.squares;
    sums[2 * blockIdx.x + 1] = total.nonfinite;
  }
}

int choose_group(const StepArguments& step) {
  if (step.num_targets == 1) return 1;
  return step.updates.dtype == Dtype::kFloat32 ? kWideGroup<float> : kWideGroup<__half>;
}

// From [M, S, N] to [S, groups, N, targets of a group].
std::vector<float> arrange_weights(const StepArguments& step, int group_size) {
  const int64_t segments = step.segments.count, rows = step.updates.count;
  const int64_t groups = divide_up(step.num_targets, group_size);
  std::vector<float> arranged(segments * groups * rows * group_size, 0.0f);
  for (int64_t m = 0; m < step.num_targets; ++m) {
    for (int64_t s = 0; s < segments; ++s) {
      const float* from = step.weights + (m * segments + s) * rows;
      float* to = arranged.data() + (s * groups + m / group_size) * rows * group_size;
      for (int64_t i = 0; i < rows; ++i) to[i * group_size + m % group_size] = from[i];
    }
  }
  return arranged;
}

// Tables, then partial sums.
struct StepWorkspace {
  explicit StepWorkspace(const StepArguments& step) : pieces(step.segments) {
    table = tables.add(pieces.table);
    rows = tables.add(step.updates.pointer, step.updates.count);
    weights = tables.add(arrange_weights(step, choose_group(step)));
    targets = tables.add(step.targets, step.num_targets);
  }

  SegmentPieces pieces;
  Tables tables;
  int64_t table, rows, weights, targets;
};

StepTables find_tables(const StepArguments& step, const StepWorkspace& space, void* workspace) {
  bool aligned = are_aligned(step.updates);
  for (int m = 0; m < step.num_targets; ++m) aligned = aligned && are_aligned(step.targets[m]);
  const bool single = step.segments.count == 1;
  return {{single ? nullptr : at<const Piece>(workspace, space.table), space.pieces.length,
           space.pieces.piece_length},
          at<const void* const>(workspace, space.rows),
          at<const float>(workspace, space.weights),
          at<const StepTarget>(workspace, space.targets),
          step.updates.count,
          step.num_targets,
          aligned};
}

template <typename T, int kTargets>
void run_group(const GeneralStep& step, int64_t num_pieces, cudaStream_t stream) {
  const int64_t groups = divide_up(step.tables.num_targets, kTargets);
  const auto blocks = static_cast<unsigned>(num_pieces * groups);
  if (step.rule.optimizer == Optimizer::kSgd) {
    FEDCMT_RUN((general_step_kernel<T, kTargets, false>), blocks, kStepThreads, stream, step);
  } else {
    FEDCMT_RUN((general_step_kernel<T, kTargets, true>), blocks, kStepThreads, stream, step);
  }
}

template <typename T>
void run_step(const GeneralStep& step, int64_t num_pieces, cudaStream_t stream) {
  if (step.tables.num_targets == 1) {
    run_group<T, 1>(step, num_pieces, stream);
  } else {
    run_group<T, kWideGroup<T>>(step, num_pieces, stream);
  }
}

void run_pieces(const GeneralStep& step, Dtype dtype, int64_t num_pieces, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run_step<float>(step, num_pieces, stream);
    case Dtype::kBFloat16:
      return run_step<__nv_bfloat16>(step, num_pieces, stream);
    case Dtype::kFloat16:
      return run_step<__half>(step, num_pieces, stream);
  }
}

}  // namespace

int64_t general_step_workspace_bytes(const StepArguments& step) {
  const StepWorkspace space(step);
  return space.tables.bytes() +
         space.pieces.count * step.num_targets * static_cast<int64_t>(sizeof(StepTotals));
}

int general_step(const StepArguments& step, double* sums, const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const StepWorkspace space(step);
  const cudaError_t uploaded = space.tables.upload(launch.workspace, stream);
  if (uploaded != cudaSuccess) return uploaded;
  const GeneralStep general{find_tables(step, space, launch.workspace), make_rule(step),
                            at<StepTotals>(launch.workspace, space.tables.bytes())};
  const int64_t num_pieces = space.pieces.count;
  if (num_pieces > 0) run_pieces(general, step.updates.dtype, num_pieces, stream);
  FEDCMT_RUN(general_step_finish, static_cast<unsigned>(step.num_targets), kThreads, stream,
             general.partials, num_pieces, sums);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
