// Python module fedcmt._C: the operations over raw pointers (integers), with the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "ops.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The last line of defence: every message for users comes from fedcmt/ops/__init__.py.
fedcmt::Dtype checked_dtype(int dtype) {
  if (dtype < 0 || dtype > 2) throw py::value_error("dtype code should be 0, 1 or 2");
  return static_cast<fedcmt::Dtype>(dtype);
}

std::vector<const void*> checked_rows(const std::vector<Address>& updates) {
  if (updates.empty()) throw py::value_error("updates should hold at least one row");
  std::vector<const void*> rows;
  for (const Address address : updates) rows.push_back(pointer<const void>(address));
  return rows;
}

void gramian_cpu(const std::vector<Address>& updates, int64_t length, int dtype, Address gram,
                 int num_threads) {
  const auto rows = checked_rows(updates);
  const fedcmt::Dtype code = checked_dtype(dtype);
  const py::gil_scoped_release release;
  fedcmt::cpu::gramian(rows.data(), static_cast<int>(rows.size()), length, code,
                       pointer<double>(gram), num_threads);
}

fedcmt::StepArguments step_arguments(Address params, Address momentum,
                                     const std::vector<const void*>& rows,
                                     const std::vector<float>& weights, int64_t length, int dtype,
                                     float lr, float beta) {
  if (weights.size() != rows.size()) throw py::value_error("weights and updates differ in number");
  // An empty tensor has the address 0 too.
  if (momentum == 0 && beta != 0.0f && length > 0) throw py::value_error("beta needs a momentum");
  return {pointer<float>(params),  pointer<float>(momentum),        rows.data(),
          weights.data(),          static_cast<int>(rows.size()),   length,
          checked_dtype(dtype),    lr,                              beta};
}

py::tuple server_step_cpu(Address params, Address momentum, const std::vector<Address>& updates,
                          const std::vector<float>& weights, int64_t length, int dtype, float lr,
                          float beta, int num_threads) {
  const auto rows = checked_rows(updates);
  const auto step = step_arguments(params, momentum, rows, weights, length, dtype, lr, beta);
  fedcmt::StepSums sums;
  {
    const py::gil_scoped_release release;
    sums = fedcmt::cpu::server_step(step, num_threads);
  }
  return py::make_tuple(sums.momentum_squares, sums.nonfinite);
}

#ifdef FEDCMT_WITH_CUDA

void check_cuda(int error) {
  if (error == 0) return;
  throw std::runtime_error("CUDA error " + std::to_string(error) + ": " +
                           fedcmt::cuda::error_string(error));
}

void gramian_cuda(const std::vector<Address>& updates, int64_t length, int dtype, Address workspace,
                  Address gram, int device, Address stream) {
  const auto rows = checked_rows(updates);
  const fedcmt::Dtype code = checked_dtype(dtype);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::gramian(rows.data(), static_cast<int>(rows.size()), length, code,
                                   pointer<void>(workspace), pointer<double>(gram), device,
                                   pointer<void>(stream)));
}

void server_step_cuda(Address params, Address momentum, const std::vector<Address>& updates,
                      const std::vector<float>& weights, int64_t length, int dtype, float lr,
                      float beta, Address workspace, Address sums, int device, Address stream) {
  const auto rows = checked_rows(updates);
  const auto step = step_arguments(params, momentum, rows, weights, length, dtype, lr, beta);
  const py::gil_scoped_release release;
  check_cuda(fedcmt::cuda::server_step(step, pointer<void>(workspace), pointer<double>(sums),
                                       device, pointer<void>(stream)));
}

#endif  // FEDCMT_WITH_CUDA

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of fedcmt.ops over raw pointers; call fedcmt.ops instead.";
  m.def("gramian_cpu", &gramian_cpu, py::arg("updates"), py::arg("length"), py::arg("dtype"),
        py::arg("gram"), py::arg("num_threads"));
  m.def("server_step_cpu", &server_step_cpu, py::arg("params"), py::arg("momentum"),
        py::arg("updates"), py::arg("weights"), py::arg("length"), py::arg("dtype"), py::arg("lr"),
        py::arg("beta"), py::arg("num_threads"));
  m.def("available_cpu_paths", &fedcmt::cpu::available_paths);
  m.def("cpu_path", &fedcmt::cpu::current_path);
  m.def("set_cpu_path", &fedcmt::cpu::set_path, py::arg("name"));
  m.def("max_threads", &fedcmt::cpu::max_threads);
#ifdef FEDCMT_WITH_CUDA
  m.def("gramian_workspace_bytes", &fedcmt::cuda::gramian_workspace_bytes, py::arg("num_updates"),
        py::arg("length"));
  m.def("gramian_cuda", &gramian_cuda, py::arg("updates"), py::arg("length"), py::arg("dtype"),
        py::arg("workspace"), py::arg("gram"), py::arg("device"), py::arg("stream"));
  m.def("server_step_workspace_bytes", &fedcmt::cuda::server_step_workspace_bytes,
        py::arg("num_updates"), py::arg("length"));
  m.def("server_step_cuda", &server_step_cuda, py::arg("params"), py::arg("momentum"),
        py::arg("updates"), py::arg("weights"), py::arg("length"), py::arg("dtype"), py::arg("lr"),
        py::arg("beta"), py::arg("workspace"), py::arg("sums"), py::arg("device"),
        py::arg("stream"));
  m.attr("cuda_architectures") = FEDCMT_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
}
