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

using Filter = std::vector<float>;

// Noise, the filters along D, H and W (empty: none), brightness, contrast, the size to thin to (zeros:
// not), the exponents of both gammas (0: none).
using Changes = std::tuple<float, std::vector<Filter>, float, float, Sizes, float, float>;

// Owns nothing: `changes` has to outlive the result, whose taps lie there.
std::vector<ChannelChanges> channel_changes(const std::vector<Changes>& changes) {
  std::vector<ChannelChanges> all;
  for (const auto& [noise, filters, brightness, contrast, small, inverted, gamma] : changes) {
    if (filters.size() != 3 || small.size() != 3) {
      throw py::value_error("filters and size should be three, along D, H and W");
    }
    ChannelChanges channel{};
    channel.noise = noise;
    for (int axis = 0; axis < 3; ++axis) {
      channel.taps[axis] = filters[axis].empty() ? nullptr : filters[axis].data();
      channel.radius[axis] = static_cast<int>(filters[axis].size() / 2);
      channel.small[axis] = small[axis];
    }
    channel.brightness = brightness;
    channel.contrast = contrast;
    channel.gamma_inverted = inverted;
    channel.gamma = gamma;
    all.push_back(channel);
  }
  return all;
}

IntensityArguments intensity_arguments(Address image, const Sizes& shape,
                                       const std::vector<ChannelChanges>& changes, uint64_t seed,
                                       const std::vector<bool>& mirrored) {
  if (shape.size() != 4 || mirrored.size() != 3 ||
      static_cast<int64_t>(changes.size()) != shape[0]) {
    throw py::value_error("image should be [C, D, H, W], with changes for each channel");
  }
  IntensityArguments a{};
  a.image = pointer<float>(image);
  a.channels = static_cast<int>(shape[0]);
  std::copy_n(shape.begin() + 1, 3, a.shape);
  a.changes = changes.data();
  a.seed = seed;
  std::copy_n(mirrored.begin(), 3, a.mirrored);
  return a;
}

void change_intensities_cpu(Address image, const Sizes& shape, const std::vector<Changes>& changes,
                            uint64_t seed, const std::vector<bool>& mirrored, int num_threads) {
  const auto channels = channel_changes(changes);
  const auto arguments = intensity_arguments(image, shape, channels, seed, mirrored);
  const py::gil_scoped_release release;
  cpu::change_intensities(arguments, num_threads);
}

#ifdef FEDCMT_WITH_CUDA

void warp_patch_cuda(const Maps& image, const Maps& labels, int label_fill,
                     const std::vector<double>& affine, const Sizes& shape, const Outputs& out,
                     const LaunchTuple& launch) {
  const auto arguments = warp_arguments(image, labels, label_fill, affine, shape, out);
  const py::gil_scoped_release release;
  check_cuda(cuda::warp_patch(arguments, launch_of(launch)));
}

int64_t change_intensities_workspace_bytes(Address image, const Sizes& shape,
                                           const std::vector<Changes>& changes, uint64_t seed,
                                           const std::vector<bool>& mirrored) {
  const auto channels = channel_changes(changes);
  return cuda::change_intensities_workspace_bytes(
      intensity_arguments(image, shape, channels, seed, mirrored));
}

void change_intensities_cuda(Address image, const Sizes& shape, const std::vector<Changes>& changes,
                             uint64_t seed, const std::vector<bool>& mirrored,
                             const LaunchTuple& launch) {
  const auto channels = channel_changes(changes);
  const auto arguments = intensity_arguments(image, shape, channels, seed, mirrored);
  const py::gil_scoped_release release;
  check_cuda(cuda::change_intensities(arguments, launch_of(launch)));
}

#endif

}  // namespace

void define_patch(py::module_& m) {
  m.def("warp_patch_cpu", &warp_patch_cpu);
  m.def("change_intensities_cpu", &change_intensities_cpu);
#ifdef FEDCMT_WITH_CUDA
  m.def("warp_patch_cuda", &warp_patch_cuda);
  m.def("change_intensities_workspace_bytes", &change_intensities_workspace_bytes);
  m.def("change_intensities_cuda", &change_intensities_cuda);
#endif
}

}  // namespace bindings
}  // namespace fedcmt
