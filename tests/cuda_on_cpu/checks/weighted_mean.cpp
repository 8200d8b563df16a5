#include "cases.h"

namespace checks {
namespace {

struct Shape {
  int members;
  int64_t length;
};

// One task: rows and weights of its own.
struct Task {
  Task(const Shape& shape, Dtype dtype, bool shifted, uint64_t seed)
      : updates(shape.members, shape.length, dtype, shifted, seed), out(shape.length, shifted) {
    Random random(seed);
    for (int i = 0; i < shape.members; ++i) weights.push_back(static_cast<float>(random.next()));
  }
  Updates updates;
  Array<float> out;
  std::vector<float> weights;
};

void check_tasks(const std::vector<Shape>& shapes, Dtype dtype, bool shifted) {
  Case line(format("weighted_mean %s of %zu tasks, the first N=%d P=%lld%s", name_of(dtype),
                   shapes.size(), shapes[0].members, static_cast<long long>(shapes[0].length),
                   shifted ? " shifted" : ""));
  std::vector<Task> tasks;
  std::vector<fedcmt::MeanTask> views;
  for (const Shape& shape : shapes) tasks.emplace_back(shape, dtype, shifted, 3 + tasks.size());
  for (size_t k = 0; k < tasks.size(); ++k) {
    fedcmt::Rows rows = tasks[k].updates.view();
    rows.length = shapes[k].length;
    views.push_back({tasks[k].out.data(), rows, tasks[k].weights.data()});
  }
  const Array<char> workspace(fedcmt::cuda::weighted_mean_workspace_bytes(views));
  line.status(fedcmt::cuda::weighted_mean(views, {workspace.data(), 0, nullptr}));
  for (const Task& task : tasks) {
    for (int64_t e = 0; e < task.out.length(); ++e) {
      double expected = 0, scale = 0;
      for (int i = 0; i < task.updates.count(); ++i) {
        const double term = double{task.weights[static_cast<size_t>(i)]} * task.updates[i].get(e);
        expected += term;
        scale += std::fabs(term);
      }
      line.near("out", task.out[e], expected, (task.updates.count() + 2) * 0x1p-24 * scale);
    }
    line.digest(task.out);
  }
  line.that("no write outside the workspace", workspace.is_intact());
}

}  // namespace

void check_weighted_mean(Effort effort) {
  const std::vector<Shape> ragged{{3, 4099}, {0, 17}, {1, 1}, {5, 0}, {9, 9001}, {2, 1023}};
  if (effort == Effort::kTiny) {
    check_tasks({{2, 4099}, {0, 7}, {3, 33}}, Dtype::kFloat32, true);
    return;
  }
  for (const Dtype dtype : dtypes()) {
    for (const bool shifted : {false, true}) {
      check_tasks(ragged, dtype, shifted);
      if (effort == Effort::kSmall) continue;
      for (const int members : {1, 2, 3, 5, 8, 9, 17, 64}) {
        check_tasks({{members, 1023}}, dtype, shifted);
      }
      check_tasks(std::vector<Shape>(40, {2, 77}), dtype, shifted);
    }
  }
}

}  // namespace checks
