#include "cases.h"

namespace checks {
namespace {

using Vector = std::vector<double>;

double inner_product(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t e = 0; e < a.size(); ++e) sum += a[e] * b[e];
  return sum;
}

// PCGrad (arXiv 2001.06782, algorithm 1) on the vectors themselves.
Vector project(const std::vector<Vector>& vectors, size_t i, const int64_t* order) {
  Vector projected = vectors[i], coefficients(vectors.size());
  coefficients[i] = 1;
  for (size_t k = 0; k < vectors.size(); ++k) {
    const auto j = static_cast<size_t>(order[k]);
    const double inner = inner_product(projected, vectors[j]);
    const double square = inner_product(vectors[j], vectors[j]);
    if (j == i || !(inner < 0 && square > 0)) continue;
    coefficients[j] -= inner / square;
    for (size_t e = 0; e < projected.size(); ++e) projected[e] -= inner / square * vectors[j][e];
  }
  return coefficients;
}

std::vector<Vector> make_vectors(size_t count, Random* random) {
  std::vector<Vector> vectors(count, Vector(count + 3));
  for (size_t i = 0; i < count; ++i) {
    // The last of three or more is zero: nothing can be projected on it.
    for (double& x : vectors[i]) x = count > 2 && i + 1 == count ? 0 : random->next();
  }
  return vectors;
}

void check_one(int num_grams, int n) {
  Case line(format("project_conflicts S=%d N=%d", num_grams, n));
  const int64_t square = int64_t{n} * n;
  const int64_t stride = n % 3 == 0 ? 1 : 3;
  const Array<int64_t> order(square);
  for (int64_t k = 0; k < square; ++k) order[k] = (k % n * stride + k / n) % n;
  const Array<double> grams(num_grams * square), coefficients(num_grams * square);
  Random random(31);
  Vector expected;
  for (int64_t s = 0; s < num_grams; ++s) {
    const std::vector<Vector> vectors = make_vectors(static_cast<size_t>(n), &random);
    for (int64_t k = 0; k < square; ++k) {
      const auto i = static_cast<size_t>(k / n), j = static_cast<size_t>(k % n);
      grams[s * square + k] = inner_product(vectors[i], vectors[j]);
    }
    for (size_t i = 0; i < vectors.size(); ++i) {
      const Vector row = project(vectors, i, order.data() + i * vectors.size());
      expected.insert(expected.end(), row.begin(), row.end());
    }
  }
  line.status(fedcmt::cuda::project_conflicts(grams.data(), num_grams, n, order.data(),
                                              coefficients.data(), {nullptr, 0, nullptr}));
  for (size_t k = 0; k < expected.size(); ++k) {
    line.near("coefficients", coefficients[static_cast<int64_t>(k)], expected[k], 1e-9);
  }
  line.digest(coefficients);
}

}  // namespace

void check_project_conflicts(Effort effort) {
  if (effort == Effort::kTiny) return check_one(2, 5);
  for (const int n : {1, 2, 3, 5, 8, 9, 17, 64}) {
    if (effort == Effort::kSmall && n > 17) continue;
    check_one(1, n);
    check_one(3, n);
  }
}

}  // namespace checks
