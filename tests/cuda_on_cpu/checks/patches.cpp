#include "patch.h"

#include <algorithm>
#include <array>

#include "cases.h"

namespace checks {
namespace {

using Size = std::array<int64_t, 3>;

int64_t voxels_of(const Size& size) { return size[0] * size[1] * size[2]; }

// --- warp_patch ---

struct Warp {
  int channels, maps;
  Size source, shape;
  double angle, scale, shift;
  bool mirrored;
};

// Turns H and W, scales all axes, about the centres.
void make_affine(const Warp& warp, double* affine) {
  const double c = std::cos(warp.angle) * warp.scale, s = std::sin(warp.angle) * warp.scale;
  const double flip = warp.mirrored ? -1 : 1;
  const double linear[3][3] = {{warp.scale, 0, 0}, {0, c, -s * flip}, {0, s, c * flip}};
  for (int axis = 0; axis < 3; ++axis) {
    double at = (static_cast<double>(warp.source[axis]) - 1) / 2 + warp.shift;
    for (int k = 0; k < 3; ++k) {
      affine[4 * axis + k] = linear[axis][k];
      at -= linear[axis][k] * (static_cast<double>(warp.shape[k]) - 1) / 2;
    }
    affine[4 * axis + 3] = at;
  }
}

// The eight samples around a point and their weights, in float64.
struct Corners {
  int64_t offset[8];  // -1 outside
  double weight[8];
};

Corners corners_at(const double* affine, const Size& source, const int64_t (&voxel)[3]) {
  Corners corners;
  double place[3];
  for (int axis = 0; axis < 3; ++axis) {
    place[axis] = affine[4 * axis + 3];
    for (int k = 0; k < 3; ++k) place[axis] += affine[4 * axis + k] * static_cast<double>(voxel[k]);
  }
  for (int corner = 0; corner < 8; ++corner) {
    corners.weight[corner] = 1;
    corners.offset[corner] = 0;
    bool inside = true;
    for (int axis = 0; axis < 3; ++axis) {
      const int up = corner >> (2 - axis) & 1;
      const double low = std::floor(place[axis]);
      const int64_t at = static_cast<int64_t>(low) + up;
      inside = inside && at >= 0 && at < source[axis];
      corners.offset[corner] = corners.offset[corner] * source[axis] + at;
      corners.weight[corner] *= up ? place[axis] - low : 1 - (place[axis] - low);
    }
    if (!inside) corners.offset[corner] = -1;
  }
  return corners;
}

// Whether `got` is the label of the largest weight, or as good as that within what rounding moves.
bool is_best(const Corners& corners, const int16_t* labels, int16_t fill, int16_t got) {
  double best = 0, own = 0;
  for (int k = 0; k < 8; ++k) {
    double sum = 0;
    const int16_t label = corners.offset[k] < 0 ? fill : labels[corners.offset[k]];
    for (int j = 0; j < 8; ++j) {
      if ((corners.offset[j] < 0 ? fill : labels[corners.offset[j]]) == label) sum += corners.weight[j];
    }
    best = std::max(best, sum);
    if (label == got) own = sum;
  }
  return own >= best - 1e-3;
}

void check_warp_of(const Warp& warp) {
  Case line(format("warp_patch C=%d L=%d %lldx%lldx%lld to %lldx%lldx%lld angle %.1f", warp.channels,
                   warp.maps, static_cast<long long>(warp.source[0]),
                   static_cast<long long>(warp.source[1]), static_cast<long long>(warp.source[2]),
                   static_cast<long long>(warp.shape[0]), static_cast<long long>(warp.shape[1]),
                   static_cast<long long>(warp.shape[2]), warp.angle));
  const int64_t from = voxels_of(warp.source), to = voxels_of(warp.shape);
  const Array<float> image(warp.channels * from), out(warp.channels * to);
  const Array<int16_t> labels(warp.maps * from), out_labels(warp.maps * to);
  Random random(3);
  for (int64_t i = 0; i < image.length(); ++i) image[i] = static_cast<float>(random.next());
  for (int64_t i = 0; i < labels.length(); ++i) {
    labels[i] = static_cast<int16_t>(std::floor(2 * random.next()));
  }
  fedcmt::WarpArguments a{};
  a.image = image.data();
  a.labels = labels.data();
  a.channels = warp.channels;
  a.label_maps = warp.maps;
  a.label_fill = -3;
  for (int axis = 0; axis < 3; ++axis) {
    a.source[axis] = warp.source[axis];
    a.shape[axis] = warp.shape[axis];
  }
  const int64_t strides[3] = {from, warp.source[1] * warp.source[2], warp.source[2]};
  std::copy_n(strides, 3, a.image_strides);
  std::copy_n(strides, 3, a.label_strides);
  make_affine(warp, a.affine);
  a.out_image = out.data();
  a.out_labels = out_labels.data();
  line.status(fedcmt::cuda::warp_patch(a, {nullptr, 0, nullptr}));
  for (int64_t e = 0; e < to; ++e) {
    const int64_t voxel[3] = {e / (warp.shape[1] * warp.shape[2]), e / warp.shape[2] % warp.shape[1],
                              e % warp.shape[2]};
    const Corners corners = corners_at(a.affine, warp.source, voxel);
    for (int c = 0; c < warp.channels; ++c) {
      double value = 0;
      for (int k = 0; k < 8; ++k) {
        if (corners.offset[k] >= 0) value += corners.weight[k] * image[c * from + corners.offset[k]];
      }
      line.near("image", out[c * to + e], value, 1e-4);
    }
    for (int l = 0; l < warp.maps; ++l) {
      line.that("label", is_best(corners, labels.data() + l * from, a.label_fill, out_labels[l * to + e]));
    }
  }
  line.digest(out);
  line.digest(out_labels);
}

// --- change_intensities ---

using Values = std::vector<double>;

struct Moments {
  double least, largest, mean, deviation;
};

Moments moments_of(const Values& x) {
  Moments m{x[0], x[0], 0, 0};
  for (const double value : x) {
    m.least = std::min(m.least, value);
    m.largest = std::max(m.largest, value);
    m.mean += value / static_cast<double>(x.size());
  }
  for (const double value : x) m.deviation += (value - m.mean) * (value - m.mean);
  m.deviation = std::sqrt(m.deviation / static_cast<double>(x.size() - 1));
  return m;
}

int64_t folded(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  i = (i % period + period) % period;
  return std::min(i, period - i);
}

void filter(Values* x, const Size& shape, int axis, const std::vector<float>& taps) {
  const Values before = *x;
  const int64_t stride = axis == 2 ? 1 : (axis == 1 ? shape[2] : shape[1] * shape[2]);
  const auto radius = static_cast<int64_t>(taps.size() / 2);
  for (int64_t e = 0; e < static_cast<int64_t>(x->size()); ++e) {
    const int64_t place = e / stride % shape[axis];
    double sum = 0;
    for (int64_t k = -radius; k <= radius; ++k) {
      sum += before[e + (folded(place + k, shape[axis]) - place) * stride] * taps[k + radius];
    }
    (*x)[e] = sum;
  }
}

void stretch(Values* x, double factor) {
  const Moments m = moments_of(*x);
  for (double& v : *x) v = std::min(std::max((v - m.mean) * factor + m.mean, m.least), m.largest);
}

void raise(Values* x, double exponent, double sign) {
  for (double& v : *x) v *= sign;
  const Moments m = moments_of(*x);
  for (double& v : *x) v = std::pow((v - m.least) / (m.largest - m.least), exponent);
  const Moments powers = moments_of(*x);
  for (double& v : *x) v = sign * ((v - powers.mean) / powers.deviation * m.deviation + m.mean);
}

// The places are odd multiples of a power of two, so that float32 finds the same neighbours.
void thin(Values* x, const Size& shape, const Size& small) {
  Values kept(voxels_of(small));
  auto nearest = [&](int axis, int64_t j) { return (2 * j + 1) * shape[axis] / (2 * small[axis]); };
  for (int64_t e = 0; e < voxels_of(small); ++e) {
    const int64_t z = nearest(0, e / (small[1] * small[2])), y = nearest(1, e / small[2] % small[1]);
    kept[e] = (*x)[(z * shape[1] + y) * shape[2] + nearest(2, e % small[2])];
  }
  for (int64_t e = 0; e < voxels_of(shape); ++e) {
    const int64_t voxel[3] = {e / (shape[1] * shape[2]), e / shape[2] % shape[1], e % shape[2]};
    double value = 0;
    for (int corner = 0; corner < 8; ++corner) {
      double weight = 1;
      int64_t offset = 0;
      for (int axis = 0; axis < 3; ++axis) {
        const double scale = static_cast<double>(small[axis]) / static_cast<double>(shape[axis]);
        const double place = std::max((static_cast<double>(voxel[axis]) + 0.5) * scale - 0.5, 0.0);
        const auto low = static_cast<int64_t>(place);
        const int up = corner >> axis & 1;
        weight *= up ? place - static_cast<double>(low) : 1 - (place - static_cast<double>(low));
        offset = offset * small[axis] + std::min(low + up, small[axis] - 1);
      }
      value += weight * kept[offset];
    }
    (*x)[e] = value;
  }
}

struct Changes {
  const char* name;
  bool filters, stretches, thins;
  float gamma_inverted, gamma, noise;
};

void check_changes(const Changes& changes, int channels, const Size& shape) {
  Case line(format("change_intensities %s C=%d %lldx%lldx%lld", changes.name, channels,
                   static_cast<long long>(shape[0]), static_cast<long long>(shape[1]),
                   static_cast<long long>(shape[2])));
  const int64_t count = voxels_of(shape);
  const std::vector<float> taps = {0.25f, 0.5f, 0.25f}, longer = {0.1f, 0.2f, 0.4f, 0.2f, 0.1f};
  fedcmt::ChannelChanges one{};
  one.brightness = 1.25f;
  one.contrast = changes.stretches ? 0.75f : 1.0f;
  one.noise = changes.noise;
  one.gamma_inverted = changes.gamma_inverted;
  one.gamma = changes.gamma;
  Size small;
  for (int axis = 0; axis < 3; ++axis) {
    small[axis] = std::max<int64_t>(1, shape[axis] / 2);
    one.small[axis] = changes.thins ? small[axis] : 0;
    one.taps[axis] = changes.filters ? (axis == 1 ? longer : taps).data() : nullptr;
    one.radius[axis] = axis == 1 ? 2 : 1;
  }
  const std::vector<fedcmt::ChannelChanges> all(static_cast<size_t>(channels), one);
  const Array<float> image(channels * count);
  Random random(5);
  for (int64_t i = 0; i < image.length(); ++i) image[i] = static_cast<float>(random.next());
  std::vector<Values> expected;
  for (int c = 0; c < channels; ++c) {
    Values x(image.data() + c * count, image.data() + (c + 1) * count);
    for (int axis = 0; axis < 3 && changes.filters; ++axis) {
      filter(&x, shape, axis, axis == 1 ? longer : taps);
    }
    for (double& v : x) v *= one.brightness;
    if (changes.stretches) stretch(&x, one.contrast);
    if (changes.thins) thin(&x, shape, small);
    if (changes.gamma_inverted > 0) raise(&x, changes.gamma_inverted, -1);
    if (changes.gamma > 0) raise(&x, changes.gamma, 1);
    expected.push_back(x);
  }
  fedcmt::IntensityArguments a{image.data(), channels, {shape[0], shape[1], shape[2]},
                               all.data(),   77,       {false, false, false}};
  const Array<char> workspace(fedcmt::cuda::change_intensities_workspace_bytes(a));
  line.status(fedcmt::cuda::change_intensities(a, {workspace.data(), 0, nullptr}));
  for (int64_t i = 0; i < image.length() && changes.noise == 0; ++i) {
    line.near("image", image[i], expected[i / count][i % count], 2e-5);
  }
  for (int64_t i = 0; i < image.length(); ++i) line.that("finite", std::isfinite(image[i]));
  line.digest(image);
  line.that("no write outside", workspace.is_intact());
}

}  // namespace

void check_warp_patch(Effort effort) {
  check_warp_of({2, 1, {5, 9, 12}, {4, 8, 20}, 0.4, 1.2, 0.3, true});
  if (effort == Effort::kTiny) return;
  for (const double angle : {0.0, 0.3, -2.0}) {
    for (const bool mirrored : {false, true}) {
      check_warp_of({1, 2, {7, 1, 5}, {4, 3, 1}, angle, 0.8, 0, mirrored});
      check_warp_of({3, 0, {1, 8, 17}, {1, 9, 17}, angle, 1.1, 0.25, mirrored});
      check_warp_of({0, 1, {6, 6, 6}, {5, 5, 33}, angle, 1.6, -7, mirrored});
    }
  }
}

void check_change_intensities(Effort effort) {
  const Size usual = {6, 8, 22}, flat = {1, 16, 12}, large = {12, 20, 24};
  const Changes all = {"all", true, true, true, 0.75f, 1.5f, 0};
  check_changes(all, 2, usual);
  check_changes({"noise", false, false, false, 0, 0, 0.5f}, 2, usual);
  if (effort == Effort::kTiny) return;
  for (const Size& shape : {usual, flat, large}) {
    check_changes({"brightness", false, false, false, 0, 0, 0}, 1, shape);
    check_changes({"filters", true, false, false, 0, 0, 0}, 1, shape);
    check_changes({"filters and contrast", true, true, false, 0, 0, 0}, 1, shape);
    check_changes({"low resolution", false, false, true, 0, 0, 0}, 1, shape);
    check_changes({"contrast and low resolution", false, true, true, 0, 0, 0}, 1, shape);
    check_changes({"gamma", false, false, false, 0, 0.75f, 0}, 1, shape);
    check_changes({"inverted gamma", false, false, false, 1.5f, 0, 0}, 1, shape);
    check_changes({"both gammas", false, false, false, 0.75f, 0.75f, 0}, 1, shape);
    check_changes(all, 3, shape);
  }
}

}  // namespace checks
