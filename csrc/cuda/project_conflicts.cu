// Sequential projections of PCGrad, computed on Gram matrices alone: no pass over the updates.
#include "reduce.cuh"

namespace fedcmt {
namespace cuda {
namespace {

// One warp for each row of coefficients. Lane l owns the coefficients l, l + 32, ..., so nobody
// else reads what it writes. A Gram matrix is symmetric: its rows are read, which lie side by side.
__global__ void __launch_bounds__(kThreads)
    project_rows(const double* __restrict__ grams, int num_rows, int num_updates,
                 const int64_t* __restrict__ order, double* coefficients) {
  const int task = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (task >= num_rows) return;  // with its whole warp
  const int lane = threadIdx.x % 32;
  const int own = task % num_updates;
  const int64_t n = num_updates;
  const double* gram = grams + task / num_updates * n * n;
  double* mine = coefficients + task * n;
  for (int64_t k = lane; k < n; k += 32) mine[k] = k == own ? 1.0 : 0.0;

  for (int64_t turn = 0; turn < n; ++turn) {
    const int64_t j = order[own * n + turn];
    if (j == own) continue;
    double inner = 0.0;
    for (int64_t k = lane; k < n; k += 32) inner = fma(mine[k], gram[j * n + k], inner);
    inner = __shfl_sync(kFullWarp, warp_total(inner), 0);
    const double square = gram[j * n + j];
    if (inner < 0.0 && square > 0.0 && j % 32 == lane) mine[j] -= inner / square;
  }
}

}  // namespace

int project_conflicts(const double* grams, int num_grams, int num_updates, const int64_t* order,
                      double* coefficients, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int num_rows = num_grams * num_updates;
  if (num_rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(num_rows, kWarps));
  FEDCMT_RUN(project_rows, blocks, kThreads, static_cast<cudaStream_t>(launch.stream), grams,
             num_rows, num_updates, order, coefficients);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
