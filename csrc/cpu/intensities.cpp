// The changes of a patch's intensities, channel by channel, in as few passes as the statistics allow.
//
// Every pass that writes also measures where the next step needs statistics. Passes are cut into
// planes or into runs of equal length, and their totals are merged in order: results do not depend on
// the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../intensity_plan.h"
#include "../patch.h"
#include "dispatch.h"
#include "threads.h"

namespace fedcmt {
namespace cpu {
namespace {

constexpr int64_t kRun = 16384;  // voxels; a multiple of kNoiseBlock
constexpr int64_t kVectorPadding = 16;

// Memory that the next call of this thread finds again: large blocks are given back to the system
// at once, and cost as much to ask for as a pass.
float* scratch_of_thread(int64_t size) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(static_cast<size_t>(size));
  return scratch.data();
}

Totals merged(const std::vector<Totals>& parts) {
  Totals all = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), 0.0, 0.0};
  for (const Totals& part : parts) {
    all.least = std::min(all.least, part.least);
    all.largest = std::max(all.largest, part.largest);
    all.sum += part.sum;
    all.squares += part.squares;
  }
  return all;
}

// Places of a small axis between which the voxels of an axis lie: torch's interpolate, trilinear.
struct AxisSteps {
  AxisSteps(int64_t size, int64_t small, bool mirrored) : first(size), next(size), share(size) {
    const float scale = static_cast<float>(small) / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) {
      const float place = std::max((static_cast<float>(i) + 0.5f) * scale - 0.5f, 0.0f);
      const int64_t to = mirrored ? size - 1 - i : i;
      first[to] = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(place), small - 1));
      next[to] = static_cast<int32_t>(std::min<int64_t>(first[to] + 1, small - 1));
      share[to] = place - static_cast<float>(first[to]);
    }
  }
  Steps view() const { return {first.data(), next.data(), share.data()}; }
  std::vector<int32_t> first, next;
  std::vector<float> share;
};

// The nearest voxel of each place of the small axis: torch's nearest-exact.
std::vector<int64_t> nearest_voxels(int64_t size, int64_t small, bool mirrored) {
  std::vector<int64_t> voxels(static_cast<size_t>(small));
  const float scale = static_cast<float>(size) / static_cast<float>(small);
  for (int64_t j = 0; j < small; ++j) {
    const auto at = static_cast<int64_t>((static_cast<float>(j) + 0.5f) * scale);
    const int64_t voxel = std::min(at, size - 1);
    voxels[j] = mirrored ? size - 1 - voxel : voxel;
  }
  return voxels;
}

int64_t fold(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  i = (i % period + period) % period;
  return std::min(i, period - i);
}

class Channel {
 public:
  Channel(const IntensityArguments& a, int channel, int num_threads)
      : a_(a),
        changes_(a.changes[channel]),
        channel_(channel),
        threads_(num_threads),
        plane_(a.shape[1] * a.shape[2]),
        count_(a.shape[0] * plane_),
        voxels_(a.image + channel * count_),
        kernels_(*current_kernels().intensities) {}

  void run() {
    const bool thins = changes_.small[0] > 0, raises = changes_.gamma_inverted > 0 || changes_.gamma > 0;
    const bool stretches = changes_.contrast != 1.0f;
    if (changes_.noise > 0) add_noise();
    if (changes_.taps[0] != nullptr || changes_.taps[1] != nullptr || changes_.taps[2] != nullptr) {
      filter(stretches || (raises && !thins));
    } else if (changes_.brightness != 1.0f) {
      change(multiplying(changes_.brightness), voxels_, count_, stretches || (raises && !thins));
    }
    PointChange stretch{};
    if (stretches) {
      stretch = stretching(measured(), changes_.contrast);
      if (!thins) change(stretch, voxels_, count_, raises);
    }
    if (thins) lower_resolution(stretch, raises);
    if (raises) raise();
  }

 private:
  int64_t runs(int64_t size) const { return (size + kRun - 1) / kRun; }

  void add_noise() {
    const int64_t pieces = runs(count_);
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads_, pieces))
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = piece * kRun, end = std::min(begin + kRun, count_);
      kernels_.add_noise(voxels_, begin, end, changes_.noise, a_.seed, static_cast<uint32_t>(channel_));
    }
  }

  // Along W and H into the scratch memory, from there along D; brightness is part of the last taps.
  void filter(bool measure) {
    const int64_t depth = a_.shape[0], height = a_.shape[1], width = a_.shape[2];
    const Filter along_h{changes_.taps[1], changes_.radius[1]}, along_w{changes_.taps[2], changes_.radius[2]};
    float* planes = scratch_of_thread(count_);
#pragma omp parallel num_threads(usable_threads(threads_, depth))
    {
      std::vector<float> row(static_cast<size_t>(width + 2 * along_w.radius + kVectorPadding)), rows(plane_);
#pragma omp for schedule(static)
      for (int64_t z = 0; z < depth; ++z) {
        kernels_.filter_plane(voxels_ + z * plane_, height, width, along_h, along_w, row.data(), rows.data(),
                              planes + z * plane_);
      }
    }
    const int radius = changes_.taps[0] == nullptr ? 0 : changes_.radius[0];
    std::vector<float> weights(static_cast<size_t>(2 * radius + 1), changes_.brightness);
    for (int k = 0; k <= 2 * radius && changes_.taps[0] != nullptr; ++k) weights[k] *= changes_.taps[0][k];
    std::vector<Totals> parts(static_cast<size_t>(depth));
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads_, depth))
    for (int64_t z = 0; z < depth; ++z) {
      std::vector<const float*> sources;
      for (int k = -radius; k <= radius; ++k) sources.push_back(planes + fold(z + k, depth) * plane_);
      kernels_.add_planes(sources.data(), weights.data(), 2 * radius + 1, plane_, voxels_ + z * plane_,
                          measure ? &parts[z] : nullptr);
    }
    keep(parts, measure);
  }

  void change(const PointChange& change, float* voxels, int64_t size, bool measure) {
    const int64_t pieces = runs(size);
    std::vector<Totals> parts(static_cast<size_t>(pieces));
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads_, pieces))
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = piece * kRun;
      kernels_.change_points(change, std::min(kRun, size - begin), voxels + begin,
                             measure ? &parts[piece] : nullptr);
    }
    keep(parts, measure);
  }

  void keep(const std::vector<Totals>& parts, bool measured) {
    known_ = measured;
    if (measured) statistics_ = statistics_of(merged(parts), count_);
  }

  // Of the voxels as they are: from the pass that wrote them, or from one more.
  const Statistics& measured() {
    if (!known_) change({PointChange::kNothing, 0, 0, 0, 0, 0, 0}, voxels_, count_, true);
    return statistics_;
  }

  // `before` still has to be applied; it is, to the voxels that are kept.
  void lower_resolution(const PointChange& before, bool measure) {
    const int64_t* small = changes_.small;
    const int64_t small_plane = small[1] * small[2], thinned = small[0] * small_plane;
    float* kept = scratch_of_thread(thinned);
    thin(kept);
    if (before.kind != PointChange::kNothing) change(before, kept, thinned, false);
    const AxisSteps along_d(a_.shape[0], small[0], a_.mirrored[0]);
    const AxisSteps along_h(a_.shape[1], small[1], a_.mirrored[1]);
    const AxisSteps along_w(a_.shape[2], small[2], a_.mirrored[2]);
    std::vector<Totals> parts(static_cast<size_t>(a_.shape[0]));
#pragma omp parallel num_threads(usable_threads(threads_, a_.shape[0]))
    {
      std::vector<float> blended(small_plane), row(static_cast<size_t>(small[2] + 1 + kVectorPadding));
#pragma omp for schedule(static)
      for (int64_t z = 0; z < a_.shape[0]; ++z) {
        const float* sources[2] = {kept + along_d.first[z] * small_plane, kept + along_d.next[z] * small_plane};
        const float weights[2] = {1.0f - along_d.share[z], along_d.share[z]};
        kernels_.add_planes(sources, weights, 2, small_plane, blended.data(), nullptr);
        kernels_.enlarge_plane(blended.data(), small[2], a_.shape[1], a_.shape[2], along_h.view(),
                               along_w.view(), row.data(), voxels_ + z * plane_,
                               measure ? &parts[z] : nullptr);
      }
    }
    keep(parts, measure);
  }

  void thin(float* kept) const {
    const int64_t* small = changes_.small;
    std::vector<int64_t> nearest[3];
    for (int axis = 0; axis < 3; ++axis) {
      nearest[axis] = nearest_voxels(a_.shape[axis], small[axis], a_.mirrored[axis]);
    }
#pragma omp parallel for schedule(static) num_threads(usable_threads(threads_, small[0]))
    for (int64_t z = 0; z < small[0]; ++z) {
      for (int64_t y = 0; y < small[1]; ++y) {
        const float* from = voxels_ + nearest[0][z] * plane_ + nearest[1][y] * a_.shape[2];
        float* to = kept + (z * small[1] + y) * small[2];
        for (int64_t x = 0; x < small[2]; ++x) to[x] = from[nearest[2][x]];
      }
    }
  }

  void raise() {
    Gamma gamma{measured(), 1.0f, 0.0f};
    for (const bool inverted : {true, false}) {
      const float exponent = inverted ? changes_.gamma_inverted : changes_.gamma, sign = inverted ? -1.0f : 1.0f;
      if (exponent == 0.0f) continue;
      change(raising(gamma, sign, exponent), voxels_, count_, true);
      gamma = restoring(gamma, sign, statistics_);
    }
    change({PointChange::kLinear, gamma.scale, gamma.shift, 0, 0, 0, 0}, voxels_, count_, false);
  }

  const IntensityArguments& a_;
  const ChannelChanges& changes_;
  int channel_, threads_;
  int64_t plane_, count_;
  float* voxels_;
  const IntensityKernels& kernels_;
  bool known_ = false;
  Statistics statistics_{};
};

}  // namespace

void change_intensities(const IntensityArguments& arguments, int num_threads) {
  for (int c = 0; c < arguments.channels; ++c) Channel(arguments, c, num_threads).run();
}

}  // namespace cpu
}  // namespace fedcmt
