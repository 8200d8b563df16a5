#include "cases.h"

namespace checks {
namespace {

struct Shape {
  int count;
  int64_t length;
};

double inner_product(const Row& a, const Row& b, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t e = begin; e < end; ++e) sum += a.get(e) * b.get(e);
  return sum;
}

// Products and sums are float64: float32 anywhere would miss this by far.
void compare(Case* line, const char* what, const Updates& updates,
             const std::vector<int64_t>& bounds, int first_row, const double* got) {
  for (size_t s = 0; s + 1 < bounds.size(); ++s) {
    const int64_t begin = bounds[s], end = bounds[s + 1];
    std::vector<double> norms;
    for (int i = 0; i < updates.count(); ++i) {
      norms.push_back(std::sqrt(inner_product(updates[i], updates[i], begin, end)));
    }
    for (int i = first_row; i < updates.count(); ++i) {
      for (int j = 0; j < updates.count(); ++j) {
        const double scale = norms[static_cast<size_t>(i)] * norms[static_cast<size_t>(j)];
        line->near(what, *got++, inner_product(updates[i], updates[j], begin, end), 1e-13 * scale);
      }
    }
  }
}

void check_one(Shape shape, Dtype dtype, bool shifted, bool several) {
  const auto bounds = make_bounds(shape.length, several);
  const int num_segments = static_cast<int>(bounds.size()) - 1;
  Case line(format("gramian %s N=%d P=%lld S=%d%s", name_of(dtype), shape.count,
                   static_cast<long long>(shape.length), num_segments, shifted ? " shifted" : ""));
  const Updates updates(shape.count, shape.length, dtype, shifted);
  const fedcmt::Rows rows = updates.view();
  const fedcmt::Segments segments{bounds.data(), num_segments};
  const int64_t square = int64_t{shape.count} * shape.count;

  const Array<double> grams(num_segments * square);
  const Array<char> workspace(fedcmt::cuda::gramian_workspace_bytes(rows, segments));
  line.status(fedcmt::cuda::gramian(rows, segments, grams.data(), {workspace.data(), 0, nullptr}));
  compare(&line, "gramian", updates, bounds, 0, grams.data());

  const Array<double> row(num_segments * shape.count);
  const Array<char> row_workspace(fedcmt::cuda::gramian_row_workspace_bytes(rows, segments));
  line.status(
      fedcmt::cuda::gramian_row(rows, segments, row.data(), {row_workspace.data(), 0, nullptr}));
  for (int64_t s = 0; s < num_segments; ++s) {
    const double* last = grams.data() + s * square + square - shape.count;
    for (int j = 0; j < shape.count; ++j) {
      line.equal("gramian_row equals the last row", row[s * shape.count + j], last[j]);
    }
  }
  line.digest(grams);
  line.digest(row);
  line.that("no write outside the workspace", workspace.is_intact() && row_workspace.is_intact());
}

std::vector<Shape> shapes(Effort effort) {
  switch (effort) {
    case Effort::kTiny:
      return {{1, 1}, {2, 4099}, {9, 4099}};
    case Effort::kSmall:
      return {{1, 0}, {1, 7}, {2, 4099}, {3, 1023}, {9, 1}, {9, 4099}, {17, 333}};
    case Effort::kFull:
      break;
  }
  std::vector<Shape> all;
  for (const int count : {1, 2, 3, 5, 8, 9, 17}) {
    for (const int64_t length : {0, 1, 7, 1023, 4099}) all.push_back({count, length});
  }
  all.insert(all.end(), {{8, 12289}, {64, 0}, {64, 1}, {64, 515}, {70, 77}});
  return all;
}

}  // namespace

void check_gramian(Effort effort) {
  for (const Shape& shape : shapes(effort)) {
    for (const Dtype dtype : dtypes()) {
      if (effort == Effort::kTiny && dtype == Dtype::kFloat16) continue;
      check_one(shape, dtype, true, false);
      if (effort != Effort::kTiny) check_one(shape, dtype, false, false);
      if (dtype == Dtype::kBFloat16) check_one(shape, dtype, false, true);
    }
  }
}

}  // namespace checks
