#include "cases.h"

namespace checks {
namespace {

using fedcmt::Optimizer;

struct Setting {
  int num_updates, num_targets;
  int64_t length;
  Dtype dtype;
  Optimizer optimizer;
  float beta;
  bool has_momentum, shifted, several;
};

const char* optimizer_name(Optimizer optimizer) {
  switch (optimizer) {
    case Optimizer::kSgd:
      return "sgd";
    case Optimizer::kAdam:
      return "adam";
    case Optimizer::kYogi:
      return "yogi";
    case Optimizer::kAdagrad:
      return "adagrad";
  }
  return "unknown";
}

std::string describe(const Setting& setting) {
  return format("server_step %s %s N=%d M=%d P=%lld beta=%g%s%s%s",
                optimizer_name(setting.optimizer), name_of(setting.dtype), setting.num_updates,
                setting.num_targets, static_cast<long long>(setting.length), setting.beta,
                setting.has_momentum ? "" : " no momentum", setting.shifted ? " shifted" : "",
                setting.several ? " segments" : "");
}

// The vectors of one target and the values that they begin with.
struct Target {
  Target(const Setting& setting, int number)
      : params(setting.length, setting.shifted),
        momentum(setting.has_momentum ? setting.length : 0, setting.shifted),
        second(setting.optimizer == Optimizer::kSgd ? 0 : setting.length, setting.shifted) {
    Random random(77 + static_cast<uint64_t>(number));
    for (int64_t e = 0; e < setting.length; ++e) {
      params[e] = static_cast<float>(random.next());
      if (momentum.length() > 0) {
        // With beta 0 it has to be left unread.
        momentum[e] = setting.beta == 0 ? NAN : static_cast<float>(random.next());
      }
      if (second.length() > 0) second[e] = static_cast<float>(0.75 + 0.5 * random.next());
    }
  }
  Array<float> params, momentum, second;
};

struct Values {
  double params, momentum, second, step;
};

// One element in float64, as csrc/ops.h has it.
Values next_values(const fedcmt::StepArguments& step, const Values& old, double d) {
  const double beta2 = step.beta2;
  Values next = old;
  next.momentum = (step.beta == 0 ? 0 : step.beta * old.momentum) + step.gain * d;
  switch (step.optimizer) {
    case Optimizer::kSgd:
      break;
    case Optimizer::kAdam:
      next.second = beta2 * old.second + (1 - beta2) * d * d;
      break;
    case Optimizer::kYogi: {
      const double sign = old.second > d * d ? 1 : (old.second < d * d ? -1 : 0);
      next.second = old.second - (1 - beta2) * d * d * sign;
      break;
    }
    case Optimizer::kAdagrad:
      next.second = old.second + d * d;
      break;
  }
  next.step = step.optimizer == Optimizer::kSgd
                  ? next.momentum
                  : next.momentum / (std::sqrt(next.second) + step.epsilon);
  next.params = old.params + step.lr * next.step;
  return next;
}

class StepCheck {
 public:
  explicit StepCheck(const Setting& setting)
      : setting_(setting),
        line_(describe(setting)),
        updates_(setting.num_updates, setting.length, setting.dtype, setting.shifted),
        bounds_(make_bounds(setting.length, setting.several)) {
    Random random(5);
    const size_t segments = bounds_.size() - 1;
    for (size_t k = 0; k < setting.num_targets * segments * setting.num_updates; ++k) {
      weights_.push_back(static_cast<float>(random.next() / std::sqrt(setting.num_updates)));
    }
    for (int m = 0; m < setting.num_targets; ++m) targets_.emplace_back(setting, m);
  }

  void run() {
    std::vector<fedcmt::StepTarget> views;
    for (const Target& target : targets_) {
      views.push_back({target.params.data(), target.momentum.data(), target.second.data()});
    }
    const fedcmt::StepArguments step{views.data(),
                                     setting_.num_targets,
                                     updates_.view(),
                                     {bounds_.data(), static_cast<int>(bounds_.size()) - 1},
                                     weights_.data(),
                                     setting_.optimizer,
                                     -0.7f,
                                     setting_.beta,
                                     0.9f,
                                     0.97f,
                                     1e-3f};
    expect_results(step);
    const Array<double> sums(2 * setting_.num_targets);
    const Array<char> workspace(fedcmt::cuda::server_step_workspace_bytes(step));
    line_.status(fedcmt::cuda::server_step(step, sums.data(), {workspace.data(), 0, nullptr}));
    line_.that("no write outside the workspace", workspace.is_intact());
    compare(sums);
  }

 private:
  void expect_results(const fedcmt::StepArguments& step) {
    for (int m = 0; m < setting_.num_targets; ++m) {
      const Target& target = targets_[static_cast<size_t>(m)];
      for (size_t s = 0; s + 1 < bounds_.size(); ++s) {
        const float* weights = weights_.data() + (m * (bounds_.size() - 1) + s) *
                                                     static_cast<size_t>(updates_.count());
        for (int64_t e = bounds_[s]; e < bounds_[s + 1]; ++e) {
          double d = 0;
          for (int i = 0; i < updates_.count(); ++i) d += double{weights[i]} * updates_[i].get(e);
          const Values old{target.params[e],
                           target.momentum.length() > 0 ? target.momentum[e] : 0.0,
                           target.second.length() > 0 ? target.second[e] : 0.0, 0};
          expected_.push_back(next_values(step, old, d));
        }
      }
    }
  }

  void compare(const Array<double>& sums) {
    // Values are of order one; float32 rounds each operation of a chain to 6e-8.
    constexpr double kTolerance = 1e-5;
    size_t k = 0;
    for (int m = 0; m < setting_.num_targets; ++m) {
      const Target& target = targets_[static_cast<size_t>(m)];
      double squares = 0;
      for (int64_t e = 0; e < setting_.length; ++e, ++k) {
        const Values& expected = expected_[k];
        squares += expected.step * expected.step;
        line_.near("params", target.params[e], expected.params, kTolerance);
        if (target.momentum.length() > 0) {
          line_.near("momentum", target.momentum[e], expected.momentum, kTolerance);
        }
        if (target.second.length() > 0) {
          line_.near("second", target.second[e], expected.second, kTolerance);
        }
      }
      line_.near("squares", sums[2 * m], squares, kTolerance * (squares + 1));
      line_.equal("nonfinite", sums[2 * m + 1], 0);
      line_.digest(target.params);
      line_.digest(target.momentum);
      line_.digest(target.second);
    }
    line_.digest(sums);
  }

  Setting setting_;
  Case line_;
  Updates updates_;
  std::vector<int64_t> bounds_;
  std::vector<float> weights_;  // [M, S, N]
  std::vector<Target> targets_;
  std::vector<Values> expected_;  // [M, P]
};

void check_nonfinite(Dtype dtype) {
  const int64_t length = 4099;
  Case line(format("server_step %s counts values that are not finite", name_of(dtype)));
  Updates updates(3, length, dtype, false);
  const std::vector<int64_t> places{0, 130, 2048, 4095, 4096, length - 1};
  for (size_t k = 0; k < places.size(); ++k) updates[1].set(places[k], k % 2 ? kNaN : -INFINITY);
  const Array<float> params(length);
  for (int64_t e = 0; e < length; ++e) params[e] = 1;
  const fedcmt::StepTarget target{params.data(), nullptr, nullptr};
  const float weights[]{0.2f, 0.3f, 0.5f};
  const int64_t bounds[]{0, length};
  const fedcmt::StepArguments step{
      &target, 1,    updates.view(), {bounds, 1}, weights, Optimizer::kSgd,
      1.0f,    0.0f, 1.0f,           0.0f,        0.0f};
  const Array<double> sums(2);
  const Array<char> workspace(fedcmt::cuda::server_step_workspace_bytes(step));
  line.status(fedcmt::cuda::server_step(step, sums.data(), {workspace.data(), 0, nullptr}));
  int64_t bad = 0;
  for (int64_t e = 0; e < length; ++e) bad += !std::isfinite(params[e]);
  line.equal("values of params", static_cast<double>(bad), static_cast<double>(places.size()));
  line.equal("nonfinite", sums[1], static_cast<double>(places.size()));
  line.that("squares are not finite", !std::isfinite(sums[0]));
}

void check_all_settings(const std::vector<int>& counts, const std::vector<int64_t>& lengths) {
  for (const int count : counts) {
    for (const int64_t length : lengths) {
      for (const Dtype dtype : dtypes()) {
        StepCheck({count, 1, length, dtype, Optimizer::kSgd, 0.6f, true, true, false}).run();
        StepCheck({count, 1, length, dtype, Optimizer::kSgd, 0.0f, true, false, false}).run();
        StepCheck({count, 1, length, dtype, Optimizer::kSgd, 0.0f, false, false, false}).run();
      }
      for (const Optimizer optimizer :
           {Optimizer::kSgd, Optimizer::kAdam, Optimizer::kYogi, Optimizer::kAdagrad}) {
        StepCheck({count, 1, length, Dtype::kFloat32, optimizer, 0.9f, true, false, false}).run();
        StepCheck({count, 3, length, Dtype::kBFloat16, optimizer, 0.9f, true, true, true}).run();
        StepCheck({count, 3, length, Dtype::kFloat16, optimizer, 0.0f, false, false, true}).run();
      }
    }
  }
}

}  // namespace

void check_server_step(Effort effort) {
  switch (effort) {
    case Effort::kTiny:
      StepCheck({2, 1, 4099, Dtype::kFloat32, Optimizer::kSgd, 0.6f, true, true, false}).run();
      StepCheck({2, 3, 4099, Dtype::kBFloat16, Optimizer::kAdam, 0.6f, true, false, true}).run();
      StepCheck({9, 1, 4099, Dtype::kFloat32, Optimizer::kSgd, 0.6f, true, false, false}).run();
      return;
    case Effort::kSmall:
      check_all_settings({1, 2, 9}, {0, 7, 4099});
      return;
    case Effort::kFull:
      check_all_settings({1, 2, 3, 5, 8, 9, 17, 64}, {0, 1, 7, 1023, 4099});
      check_all_settings({300}, {333});
      for (const Dtype dtype : dtypes()) check_nonfinite(dtype);
      return;
  }
}

}  // namespace checks
