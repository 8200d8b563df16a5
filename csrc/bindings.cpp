// Python module fedcmt._C: the operations over raw pointers (integers), with the GIL released.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "bindings.h"
#include "labels.h"
#include "norm.h"
#include "ops.h"

namespace {

using fedcmt::bindings::Address;
using fedcmt::bindings::pointer;
using Addresses = std::vector<Address>;
using Bounds = std::vector<int64_t>;

// Checks here are the last line of defence: every message for users comes from fedcmt/ops.
fedcmt::Dtype checked_dtype(int dtype) {
  if (dtype < 0 || dtype > 2) throw py::value_error("dtype code should be 0, 1 or 2");
  return static_cast<fedcmt::Dtype>(dtype);
}

// Owns the host arrays that fedcmt::Rows points to.
class HostRows {
 public:
  HostRows(const Addresses& addresses, int64_t length, int dtype) {
    for (const Address address : addresses) pointers_.push_back(pointer<const void>(address));
    rows_ = {pointers_.data(), static_cast<int>(pointers_.size()), length, checked_dtype(dtype)};
  }
  HostRows(const HostRows&) = delete;
  HostRows& operator=(const HostRows&) = delete;
  const fedcmt::Rows& get() const { return rows_; }

 private:
  std::vector<const void*> pointers_;
  fedcmt::Rows rows_{};
};

fedcmt::Segments segments_of(const Bounds& bounds) {
  if (bounds.size() < 2) throw py::value_error("bounds should hold at least two numbers");
  return {bounds.data(), static_cast<int>(bounds.size()) - 1};
}

// What the operations on N whole updates share.
struct Products {
  HostRows rows;
  fedcmt::Segments segments;
  Products(const Addresses& updates, int dtype, const Bounds& bounds)
      : rows(updates, bounds.empty() ? 0 : bounds.back(), dtype), segments(segments_of(bounds)) {
    if (updates.empty()) throw py::value_error("updates should hold at least one row");
  }
};

using Rule = std::tuple<int, float, float, float, float, float>;

// Owns the host arrays that fedcmt::StepArguments points to.
class HostStep {
 public:
  HostStep(const std::vector<Addresses>& state, const Addresses& updates, int dtype,
           const Bounds& bounds, std::vector<float> weights, const Rule& rule)
      : products_(updates, dtype, bounds), weights_(std::move(weights)) {
    if (state.size() != 3 || state[0].empty() || state[1].size() != state[0].size() ||
        state[2].size() != state[0].size()) {
      throw py::value_error("state should be params, momentum and second of every target");
    }
    for (size_t m = 0; m < state[0].size(); ++m) {
      targets_.push_back({pointer<float>(state[0][m]), pointer<float>(state[1][m]),
                          pointer<float>(state[2][m])});
    }
    const fedcmt::Segments& segments = products_.segments;
    if (weights_.size() != targets_.size() * segments.count * updates.size()) {
      throw py::value_error("weights should hold targets x segments x updates numbers");
    }
    const auto [optimizer, lr, beta, gain, beta2, epsilon] = rule;
    if (optimizer < 0 || optimizer > 3) throw py::value_error("optimizer code should be 0 to 3");
    step_ = {targets_.data(), static_cast<int>(targets_.size()), products_.rows.get(),
             segments,        weights_.data(),
             static_cast<fedcmt::Optimizer>(optimizer), lr, beta, gain, beta2, epsilon};
    check_state();
  }
  HostStep(const HostStep&) = delete;
  HostStep& operator=(const HostStep&) = delete;
  const fedcmt::StepArguments& get() const { return step_; }

 private:
  void check_state() const {
    if (step_.updates.length == 0) return;  // an empty tensor has the address 0 too
    for (const fedcmt::StepTarget& target : targets_) {
      if (target.momentum == nullptr && step_.beta != 0.0f) {
        throw py::value_error("beta needs a momentum");
      }
      if (target.second == nullptr && step_.optimizer != fedcmt::Optimizer::kSgd) {
        throw py::value_error("the optimizer needs a second moment");
      }
    }
  }

  Products products_;
  std::vector<float> weights_;
  std::vector<fedcmt::StepTarget> targets_;
  fedcmt::StepArguments step_{};
};

using Task = std::tuple<Address, Addresses, std::vector<float>, int64_t>;

// Owns the host arrays that the fedcmt::MeanTasks point to.
class HostTasks {
 public:
  HostTasks(const std::vector<Task>& tasks, int dtype) : weights_(tasks.size()) {
    rows_.reserve(tasks.size());
    for (size_t t = 0; t < tasks.size(); ++t) {
      const auto& [out, rows, weights, length] = tasks[t];
      if (weights.size() != rows.size()) throw py::value_error("weights and rows differ in number");
      rows_.push_back(std::make_unique<HostRows>(rows, length, dtype));
      weights_[t] = weights;
      tasks_.push_back({pointer<float>(out), rows_.back()->get(), weights_[t].data()});
    }
  }
  const std::vector<fedcmt::MeanTask>& get() const { return tasks_; }

 private:
  std::vector<std::unique_ptr<HostRows>> rows_;
  std::vector<std::vector<float>> weights_;
  std::vector<fedcmt::MeanTask> tasks_;
};

fedcmt::ScreenArguments screen_arguments(Address from, int from_dtype, Address to, int to_dtype,
                                         int64_t length) {
  return {pointer<const void>(from), checked_dtype(from_dtype), pointer<void>(to),
          checked_dtype(to_dtype), length};
}

// --- CPU --------------------------------------------------------------------------------------

using ExecutionTuple = std::tuple<int, bool>;

fedcmt::Execution execution_of(const ExecutionTuple& execution) {
  return {std::get<0>(execution), std::get<1>(execution)};
}

void gramian_cpu(const Addresses& updates, int dtype, const Bounds& bounds, Address grams,
                 const ExecutionTuple& execution) {
  const Products products(updates, dtype, bounds);
  const py::gil_scoped_release release;
  fedcmt::cpu::gramian(products.rows.get(), products.segments, pointer<double>(grams),
                       execution_of(execution));
}

void gramian_row_cpu(const Addresses& updates, int dtype, const Bounds& bounds, Address row,
                     const ExecutionTuple& execution) {
  const Products products(updates, dtype, bounds);
  const py::gil_scoped_release release;
  fedcmt::cpu::gramian_row(products.rows.get(), products.segments, pointer<double>(row),
                           execution_of(execution));
}

std::vector<std::pair<double, int64_t>> server_step_cpu(
    const std::vector<Addresses>& state, const Addresses& updates, int dtype, const Bounds& bounds,
    const std::vector<float>& weights, const Rule& rule, const ExecutionTuple& execution) {
  const HostStep step(state, updates, dtype, bounds, weights, rule);
  std::vector<fedcmt::StepSums> sums(step.get().num_targets);
  {
    const py::gil_scoped_release release;
    fedcmt::cpu::server_step(step.get(), sums.data(), execution_of(execution));
  }
  std::vector<std::pair<double, int64_t>> pairs;
  for (const fedcmt::StepSums& sum : sums) pairs.emplace_back(sum.squares, sum.nonfinite);
  return pairs;
}

void weighted_mean_cpu(const std::vector<Task>& tasks, int dtype, const ExecutionTuple& execution) {
  const HostTasks host(tasks, dtype);
  const py::gil_scoped_release release;
  fedcmt::cpu::weighted_mean(host.get(), execution_of(execution));
}

py::tuple screen_cpu(Address from, int from_dtype, Address to, int to_dtype, int64_t length,
                     const ExecutionTuple& execution) {
  const auto arguments = screen_arguments(from, from_dtype, to, to_dtype, length);
  fedcmt::ScreenSums sums;
  {
    const py::gil_scoped_release release;
    sums = fedcmt::cpu::screen(arguments, execution_of(execution));
  }
  return py::make_tuple(sums.nonfinite, sums.squares, sums.largest);
}

void project_conflicts_cpu(Address grams, int num_grams, int num_updates, Address order,
                           Address coefficients) {
  const py::gil_scoped_release release;
  fedcmt::cpu::project_conflicts(pointer<const double>(grams), num_grams, num_updates,
                                 pointer<const int64_t>(order), pointer<double>(coefficients));
}

using Taps = std::tuple<Address, Address, Address, Address, int64_t>;  // as in AxisTaps
using Strides = std::vector<int64_t>;

// logits and labels come with all their strides, weights (0 for none) with all of theirs; shape is
// that of the logits, K included; region_values is 0 for labels.
bool logits_to_labels_cpu(Address logits, const Strides& shape, const Strides& logit_strides,
                          Address weights, const Strides& weight_strides,
                          const std::vector<Taps>& taps, Address region_values, float threshold,
                          Address labels, const Strides& label_strides, int label_bytes,
                          int num_threads) {
  if (shape.size() != 4 || logit_strides.size() != 4 || weight_strides.size() != 3 ||
      taps.size() != 3 || label_strides.size() != 3 || logit_strides[3] != 1 ||
      weight_strides[2] != 1 || (label_bytes != 1 && label_bytes != 2)) {
    throw py::value_error("logits should be [K, D, H, W], weights and labels [D, H, W]");
  }
  fedcmt::LabelArguments a{};
  a.logits = pointer<const uint16_t>(logits);
  std::copy_n(logit_strides.begin(), 3, a.logit_strides);
  a.weights = pointer<const uint16_t>(weights);
  std::copy_n(weight_strides.begin(), 2, a.weight_strides);
  a.num_heads = static_cast<int>(shape[0]);
  std::copy_n(shape.begin() + 1, 3, a.shape);
  for (int axis = 0; axis < 3; ++axis) {
    const auto& [first, second, w0, w1, size] = taps[axis];
    a.taps[axis] = {pointer<const int32_t>(first), pointer<const int32_t>(second),
                    pointer<const double>(w0), pointer<const double>(w1), size};
  }
  a.region_values = pointer<const int32_t>(region_values);
  a.region_threshold = threshold;
  a.labels = pointer<void>(labels);
  std::copy_n(label_strides.begin(), 3, a.label_strides);
  a.label_bytes = label_bytes;
  const py::gil_scoped_release release;
  return fedcmt::cpu::logits_to_labels(a, num_threads);
}

void instance_norm_cpu(Address values, const std::tuple<int64_t, int64_t, int64_t>& shape,
                       Address weight, Address bias, double epsilon, float slope,
                       int num_threads) {
  const auto [instances, channels, size] = shape;
  const fedcmt::NormArguments arguments{pointer<float>(values), instances, channels, size,
                                        pointer<const float>(weight), pointer<const float>(bias),
                                        epsilon, slope};
  const py::gil_scoped_release release;
  fedcmt::cpu::instance_norm(arguments, num_threads);
}

void define_cpu(py::module_& m) {
  m.def("gramian_cpu", &gramian_cpu);
  m.def("gramian_row_cpu", &gramian_row_cpu);
  m.def("server_step_cpu", &server_step_cpu);
  m.def("weighted_mean_cpu", &weighted_mean_cpu);
  m.def("screen_cpu", &screen_cpu);
  m.def("project_conflicts_cpu", &project_conflicts_cpu);
  m.def("logits_to_labels_cpu", &logits_to_labels_cpu);
  m.def("instance_norm_cpu", &instance_norm_cpu);
  m.def("available_cpu_paths", &fedcmt::cpu::available_paths);
  m.def("cpu_path", &fedcmt::cpu::current_path);
  m.def("set_cpu_path", &fedcmt::cpu::set_path, py::arg("name"));
  m.def("max_threads", &fedcmt::cpu::max_threads);
}

// --- CUDA -------------------------------------------------------------------------------------

#ifdef FEDCMT_WITH_CUDA

using fedcmt::bindings::check_cuda;
using fedcmt::bindings::launch_of;
using fedcmt::bindings::LaunchTuple;

int64_t gramian_workspace_bytes(const Addresses& updates, int dtype, const Bounds& bounds) {
  const Products products(updates, dtype, bounds);
  return fedcmt::cuda::gramian_workspace_bytes(products.rows.get(), products.segments);
}

void gramian_cuda(const Addresses& updates, int dtype, const Bounds& bounds, Address grams,
                  const LaunchTuple& launch) {
  const Products products(updates, dtype, bounds);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::gramian(products.rows.get(), products.segments, pointer<double>(grams),
                                   launch_of(launch)));
}

int64_t gramian_row_workspace_bytes(const Addresses& updates, int dtype, const Bounds& bounds) {
  const Products products(updates, dtype, bounds);
  return fedcmt::cuda::gramian_row_workspace_bytes(products.rows.get(), products.segments);
}

void gramian_row_cuda(const Addresses& updates, int dtype, const Bounds& bounds, Address row,
                      const LaunchTuple& launch) {
  const Products products(updates, dtype, bounds);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::gramian_row(products.rows.get(), products.segments, pointer<double>(row),
                                       launch_of(launch)));
}

int64_t server_step_workspace_bytes(const std::vector<Addresses>& state, const Addresses& updates,
                                    int dtype, const Bounds& bounds,
                                    const std::vector<float>& weights, const Rule& rule) {
  const HostStep step(state, updates, dtype, bounds, weights, rule);
  return fedcmt::cuda::server_step_workspace_bytes(step.get());
}

void server_step_cuda(const std::vector<Addresses>& state, const Addresses& updates, int dtype,
                      const Bounds& bounds, const std::vector<float>& weights, const Rule& rule,
                      Address sums, const LaunchTuple& launch) {
  const HostStep step(state, updates, dtype, bounds, weights, rule);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::server_step(step.get(), pointer<double>(sums), launch_of(launch)));
}

int64_t weighted_mean_workspace_bytes(const std::vector<Task>& tasks, int dtype) {
  return fedcmt::cuda::weighted_mean_workspace_bytes(HostTasks(tasks, dtype).get());
}

void weighted_mean_cuda(const std::vector<Task>& tasks, int dtype, const LaunchTuple& launch) {
  const HostTasks host(tasks, dtype);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::weighted_mean(host.get(), launch_of(launch)));
}

int64_t screen_workspace_bytes(Address from, int from_dtype, Address to, int to_dtype,
                               int64_t length) {
  return fedcmt::cuda::screen_workspace_bytes(
      screen_arguments(from, from_dtype, to, to_dtype, length));
}

void screen_cuda(Address from, int from_dtype, Address to, int to_dtype, int64_t length,
                 Address sums, const LaunchTuple& launch) {
  const auto arguments = screen_arguments(from, from_dtype, to, to_dtype, length);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::screen(arguments, pointer<double>(sums), launch_of(launch)));
}

void project_conflicts_cuda(Address grams, int num_grams, int num_updates, Address order,
                            Address coefficients, const LaunchTuple& launch) {
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::project_conflicts(pointer<const double>(grams), num_grams, num_updates,
                                             pointer<const int64_t>(order),
                                             pointer<double>(coefficients), launch_of(launch)));
}

void define_cuda(py::module_& m) {
  m.def("gramian_workspace_bytes", &gramian_workspace_bytes);
  m.def("gramian_cuda", &gramian_cuda);
  m.def("gramian_row_workspace_bytes", &gramian_row_workspace_bytes);
  m.def("gramian_row_cuda", &gramian_row_cuda);
  m.def("server_step_workspace_bytes", &server_step_workspace_bytes);
  m.def("server_step_cuda", &server_step_cuda);
  m.def("weighted_mean_workspace_bytes", &weighted_mean_workspace_bytes);
  m.def("weighted_mean_cuda", &weighted_mean_cuda);
  m.def("screen_workspace_bytes", &screen_workspace_bytes);
  m.def("screen_cuda", &screen_cuda);
  m.def("project_conflicts_cuda", &project_conflicts_cuda);
  m.def("take_launch_count", &fedcmt::cuda::take_launch_count);
  m.attr("cuda_architectures") = FEDCMT_CUDA_ARCHITECTURES;
}

#else

void define_cuda(py::module_& m) { m.attr("cuda_architectures") = ""; }

#endif  // FEDCMT_WITH_CUDA

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of fedcmt.ops over raw pointers; call fedcmt.ops instead.";
  define_cpu(m);
  define_cuda(m);
  fedcmt::bindings::define_patch(m);
#ifdef FEDCMT_SIMULATED
  m.attr("cuda_is_simulated") = true;
#else
  m.attr("cuda_is_simulated") = false;
#endif
}
