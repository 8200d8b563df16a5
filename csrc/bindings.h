// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops.h"

namespace py = pybind11;

namespace fedcmt {
namespace bindings {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef FEDCMT_WITH_CUDA

using LaunchTuple = std::tuple<Address, int, Address>;  // workspace, device, stream

inline cuda::Launch launch_of(const LaunchTuple& launch) {
  const auto [workspace, device, stream] = launch;
  return {pointer<void>(workspace), device, pointer<void>(stream)};
}

inline void check_cuda(int error) {
  if (error == 0) return;
  throw std::runtime_error("CUDA error " + std::to_string(error) + ": " +
                           cuda::error_string(error));
}

#endif  // FEDCMT_WITH_CUDA

void define_patch(py::module_& m);  // bindings_patch.cpp

}  // namespace bindings
}  // namespace fedcmt
