// The server step of one target and one segment: one pass, one launch.
//
// Pointers and weights travel as kernel arguments. Up to 8 rows are unrolled, more are looped over.
#include "server_step.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kMaxUnrolledRows = 8;
constexpr int64_t kElementsABlock = 2048;
constexpr int64_t kCounterBytes = 256;

template <int kCapacity>
struct WeightedRows {
  const void* pointer[kCapacity];
  float weight[kCapacity];
};

// kRows: number of rows where it is known at compile time, else 0.
constexpr int row_capacity(int rows) { return rows > 0 ? rows : kMaxSingleRows; }

template <typename T, int kRows, bool kAdaptive>
struct SingleStep {
  static constexpr int kSize = Packet<T>::kSize;
  WeightedRows<row_capacity(kRows)> rows;
  int num_rows;
  StepTarget target;
  StepRule rule;
  int64_t length;

  template <bool kWide>
  __device__ __forceinline__ void run(int64_t e, double& squares, int& nonfinite) const {
    const Range range{0, length};
    const int count = kRows > 0 ? kRows : num_rows;
    float d[kSize] = {};
#pragma unroll(kRows > 0 ? kRows : 4)
    for (int i = 0; i < count; ++i) {
      const Packet<T> packet = load_row<kWide>(static_cast<const T*>(rows.pointer[i]), e, range);
#pragma unroll
      for (int k = 0; k < kSize; ++k) d[k] = fmaf(rows.weight[i], to_float(packet.value[k]), d[k]);
    }
    step_elements<kSize, kAdaptive, kWide>(rule, target, d, e, range, squares, nonfinite);
  }
};

template <typename T, int kRows, bool kAdaptive>
__global__ void __launch_bounds__(kThreads)
    single_step_kernel(SingleStep<T, kRows, kAdaptive> step, bool aligned, StepTotals* partials,
                       unsigned* counter, double* __restrict__ sums) {
  constexpr int kSize = Packet<T>::kSize;
  double squares = 0.0;
  int nonfinite = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (aligned) {
    for (; e + kSize <= step.length; e += stride) step.template run<true>(e, squares, nonfinite);
  }
  for (; e < step.length; e += stride) step.template run<false>(e, squares, nonfinite);
  StepTotals totals{squares, static_cast<double>(nonfinite)};
  if (grid_total(totals, partials, counter)) {
    sums[0] = totals.squares;
    sums[1] = totals.nonfinite;
  }
}

struct StepCall {
  StepArguments step;
  bool aligned;
  unsigned* counter;
  StepTotals* partials;
  double* sums;
  cudaStream_t stream;
};

unsigned count_blocks(const StepArguments& step) {
  return static_cast<unsigned>(count_grid_blocks(step.updates.length, kElementsABlock));
}

template <typename T, int kRows, bool kAdaptive>
void run_rows(const StepCall& call) {
  const Rows& updates = call.step.updates;
  SingleStep<T, kRows, kAdaptive> step{
      {}, updates.count, call.step.targets[0], make_rule(call.step), updates.length};
  for (int i = 0; i < updates.count; ++i) {
    step.rows.pointer[i] = updates.pointer[i];
    step.rows.weight[i] = call.step.weights[i];
  }
  FEDCMT_RUN((single_step_kernel<T, kRows, kAdaptive>), count_blocks(call.step), kThreads,
             call.stream, step, call.aligned, call.partials, call.counter, call.sums);
}

template <typename T, int kRows = 1>
void run_step(const StepCall& call) {
  constexpr bool kUnrolled = kRows <= kMaxUnrolledRows;
  if constexpr (kUnrolled) {
    if (call.step.updates.count != kRows) return run_step<T, kRows + 1>(call);
  }
  if (call.step.optimizer == Optimizer::kSgd) {
    run_rows<T, kUnrolled ? kRows : 0, false>(call);
  } else {
    run_rows<T, kUnrolled ? kRows : 0, true>(call);
  }
}

bool is_single(const StepArguments& step) {
  return step.num_targets == 1 && step.segments.count == 1 && step.updates.count <= kMaxSingleRows;
}

}  // namespace

// The counter of finished blocks, then their totals.
int64_t single_step_workspace_bytes(const StepArguments& step) {
  return kCounterBytes + count_blocks(step) * static_cast<int64_t>(sizeof(StepTotals));
}

int single_step(const StepArguments& step, double* sums, const Launch& launch) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t zeroed = cudaMemsetAsync(launch.workspace, 0, kCounterBytes, stream);
  if (zeroed != cudaSuccess) return zeroed;
  char* workspace = static_cast<char*>(launch.workspace);
  const StepCall call{step,
                      are_aligned(step.updates) && are_aligned(step.targets[0]),
                      reinterpret_cast<unsigned*>(workspace),
                      reinterpret_cast<StepTotals*>(workspace + kCounterBytes),
                      sums,
                      stream};
  switch (step.updates.dtype) {
    case Dtype::kFloat32:
      run_step<float>(call);
      break;
    case Dtype::kBFloat16:
      run_step<__nv_bfloat16>(call);
      break;
    case Dtype::kFloat16:
      run_step<__half>(call);
      break;
  }
  return cudaGetLastError();
}

int64_t server_step_workspace_bytes(const StepArguments& step) {
  return is_single(step) ? single_step_workspace_bytes(step) : general_step_workspace_bytes(step);
}

int server_step(const StepArguments& step, double* sums, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  return is_single(step) ? single_step(step, sums, launch) : general_step(step, sums, launch);
}

}  // namespace cuda
}  // namespace fedcmt
