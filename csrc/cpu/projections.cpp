// PCGrad's sequential projections (arXiv 2001.06782, algorithm 1) on Gram matrices. N^3 steps in
// all, so one path and one thread do.
#include <algorithm>

#include "../ops.h"

namespace fedcmt {
namespace cpu {
namespace {

void project_row(const double* gram, int64_t n, int64_t i, const int64_t* order, double* row) {
  std::fill(row, row + n, 0.0);
  row[i] = 1.0;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t j = order[k];
    if (j == i) continue;
    const double* products = gram + j * n;  // the matrix is symmetric
    double inner = 0.0;
    for (int64_t q = 0; q < n; ++q) inner += row[q] * products[q];
    if (inner < 0.0 && products[j] > 0.0) row[j] -= inner / products[j];
  }
}

}  // namespace

void project_conflicts(const double* grams, int num_grams, int num_updates, const int64_t* order,
                       double* coefficients) {
  const int64_t n = num_updates;
  for (int64_t s = 0; s < num_grams; ++s) {
    for (int64_t i = 0; i < n; ++i) {
      project_row(grams + s * n * n, n, i, order + i * n, coefficients + (s * n + i) * n);
    }
  }
}

}  // namespace cpu
}  // namespace fedcmt
