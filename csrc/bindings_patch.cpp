// The operations on training patches, as part of fedcmt._C.
#include <algorithm>
#include <utility>
#include <vector>

#include "bindings.h"
#include "patch.h"

namespace fedcmt {
namespace bindings {
namespace {

using Sizes = std::vector<int64_t>;

// One array of a patch: address, shape [K, D, H, W] and strides of K, D and H.
using Maps = std::tuple<Address, Sizes, Sizes>;
using Outputs = std::pair<Address, Address>;  // image and labels, without gaps

WarpArguments warp_arguments(const Maps& image, const Maps& labels, int label_fill,
                             const std::vector<double>& affine, const Sizes& shape,
                             const Outputs& out) {
  const auto& [image_address, image_shape, image_strides] = image;
  const auto& [label_address, label_shape, label_strides] = labels;
  if (image_shape.size() != 4 || label_shape.size() != 4 || image_strides.size() != 3 ||
      label_strides.size() != 3 || affine.size() != 12 || shape.size() != 3) {
    throw py::value_error("image and labels should be [K, D, H, W], the affine [3, 4]");
  }
  WarpArguments a{};
  a.image = pointer<const float>(image_address);
  std::copy_n(image_strides.begin(), 3, a.image_strides);
  a.channels = static_cast<int>(image_shape[0]);
  a.labels = pointer<const int16_t>(label_address);
  std::copy_n(label_strides.begin(), 3, a.label_strides);
  a.label_maps = static_cast<int>(label_shape[0]);
  a.label_fill = static_cast<int16_t>(label_fill);
  std::copy_n(image_shape.begin() + 1, 3, a.source);
  std::copy_n(affine.begin(), 12, a.affine);
  std::copy_n(shape.begin(), 3, a.shape);
  a.out_image = pointer<float>(out.first);
  a.out_labels = pointer<int16_t>(out.second);
  return a;
}

void warp_patch_cpu(const Maps& image, const Maps& labels, int label_fill,
                    const std::vector<double>& affine, const Sizes& shape, const Outputs& out,
                    int num_threads) {
  const auto arguments = warp_arguments(image, labels, label_fill, affine, shape, out);
  const py::gil_scoped_release release;
  cpu::warp_patch(arguments, num_threads);
}

#ifdef FEDCMT_WITH_CUDA

void warp_patch_cuda(const Maps& image, const Maps& labels, int label_fill,
                     const std::vector<double>& affine, const Sizes& shape, const Outputs& out,
                     const LaunchTuple& launch) {
  const auto arguments = warp_arguments(image, labels, label_fill, affine, shape, out);
  const py::gil_scoped_release release;
  check_cuda(cuda::warp_patch(arguments, launch_of(launch)));
}

#endif

}  // namespace

void define_patch(py::module_& m) {
  m.def("warp_patch_cpu", &warp_patch_cpu);
#ifdef FEDCMT_WITH_CUDA
  m.def("warp_patch_cuda", &warp_patch_cuda);
#endif
}

}  // namespace bindings
}  // namespace fedcmt
