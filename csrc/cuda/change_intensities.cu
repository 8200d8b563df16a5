// The changes of a patch's intensities, channel by channel. What follows from statistics stays on the
// device, so that a call is a row of launches without a wait between them.
#include "intensity_kernels.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int64_t kCounterBytes = 256;
constexpr int64_t kStateBytes = 256;
static_assert(sizeof(State) <= kStateBytes, "the partial totals follow");

unsigned count_blocks(int64_t voxels) {
  return static_cast<unsigned>(count_grid_blocks(voxels, kVoxelsABlock));
}

class Channel {
 public:
  Channel(const IntensityArguments& a, int channel, const Launch& launch)
      : a_(a), changes_(a.changes[channel]), channel_(static_cast<unsigned>(channel)) {
    count_ = a.shape[0] * a.shape[1] * a.shape[2];
    voxels_ = a.image + channel * count_;
    stream_ = static_cast<cudaStream_t>(launch.stream);
    char* workspace = static_cast<char*>(launch.workspace);
    counter_ = reinterpret_cast<unsigned*>(workspace);
    state_ = reinterpret_cast<State*>(workspace + kCounterBytes);
    partials_ = reinterpret_cast<DeviceTotals*>(workspace + kCounterBytes + kStateBytes);
    scratch_ = reinterpret_cast<float*>(partials_ + count_blocks(count_));
  }

  void run() {
    const bool inverts = changes_.gamma_inverted > 0, raises = inverts || changes_.gamma > 0;
    const bool thins = changes_.small[0] > 0, stretches = changes_.contrast != 1.0f;
    if (changes_.noise > 0) {
      FEDCMT_RUN(noise_kernel, count_blocks(count_), kThreads, stream_, voxels_, count_,
                 changes_.noise, a_.seed, channel_);
    }
    const float* filtered = filter();
    const Plan raise = raising_first(inverts ? -1.0f : 1.0f,
                                     inverts ? changes_.gamma_inverted : changes_.gamma);
    const Plan stretch{{Next::kStretch, Next::kNothing}, changes_.contrast, {}, 0};
    const Plan* plan = stretches ? &stretch : (raises && !thins ? &raise : nullptr);
    if (plan != nullptr || filtered != voxels_ || changes_.brightness != 1.0f) {
      change(filtered, voxels_, multiplying(changes_.brightness), nullptr, plan);
    }
    if (stretches && !thins) change(voxels_, voxels_, {}, state_, raises ? &raise : nullptr);
    if (thins) lower_resolution(stretches ? state_ : nullptr, raises ? &raise : nullptr);
    if (raises) finish_gammas(inverts && changes_.gamma > 0, inverts ? -1.0f : 1.0f);
  }

 private:
  static Plan raising_first(float sign, float exponent) {
    return {{Next::kRaise, Next::kNothing}, 0, {sign, 0}, exponent};
  }

  Measuring measuring(const Plan* plan) const {
    return {partials_, counter_, state_, plan == nullptr ? Plan{} : *plan};
  }

  // Applies `change`, or what the state holds; then the plan follows, if there is one.
  void change(const float* from, float* to, const PointChange& change, const State* state,
              const Plan* plan) const {
    const Pass pass{from, to, count_, change, state};
    if (plan != nullptr) {
      FEDCMT_RUN((change_kernel<true>), count_blocks(count_), kThreads, stream_, pass,
                 measuring(plan));
    } else {
      FEDCMT_RUN((change_kernel<false>), count_blocks(count_), kThreads, stream_, pass,
                 measuring(plan));
    }
  }

  // Returns where the filtered voxels are: in the image or in the scratch memory.
  const float* filter() const {
    float *from = voxels_, *to = scratch_;
    int64_t stride = 1;
    for (int axis = 2; axis >= 0; --axis) {
      if (changes_.taps[axis] != nullptr) {
        AxisFilter one{{}, changes_.radius[axis], a_.shape[axis], stride};
        for (int k = 0; k <= 2 * one.radius; ++k) one.tap[k] = changes_.taps[axis][k];
        FEDCMT_RUN(filter_kernel, count_blocks(count_), kThreads, stream_, from, to, count_, one);
        float* const filtered = to;
        to = from;
        from = filtered;
      }
      stride *= a_.shape[axis];
    }
    return from;
  }

  void lower_resolution(const State* before, const Plan* plan) const {
    Resizing r{};
    for (int axis = 0; axis < 3; ++axis) {
      r.shape[axis] = a_.shape[axis];
      r.small[axis] = changes_.small[axis];
      r.mirrored[axis] = a_.mirrored[axis];
    }
    const int64_t thinned = r.small[0] * r.small[1] * r.small[2];
    FEDCMT_RUN(thin_kernel, count_blocks(thinned), kThreads, stream_, voxels_, scratch_, r, before);
    if (plan != nullptr) {
      FEDCMT_RUN((enlarge_kernel<true>), count_blocks(count_), kThreads, stream_, scratch_, voxels_,
                 r, measuring(plan));
    } else {
      FEDCMT_RUN((enlarge_kernel<false>), count_blocks(count_), kThreads, stream_, scratch_,
                 voxels_, r, measuring(plan));
    }
  }

  // The state holds the first power.
  void finish_gammas(bool both, float first_sign) const {
    const Plan restore{{Next::kRestore, Next::kNothing}, 0, {first_sign, 0}, 0};
    if (both) {
      const Plan next{{Next::kRestore, Next::kRaise}, 0, {-1.0f, 1.0f}, changes_.gamma};
      const Plan last{{Next::kRestore, Next::kNothing}, 0, {1.0f, 0}, 0};
      change(voxels_, voxels_, {}, state_, &next);
      change(voxels_, voxels_, {}, state_, &last);
    } else {
      change(voxels_, voxels_, {}, state_, &restore);
    }
    change(voxels_, voxels_, {}, state_, nullptr);
  }

  const IntensityArguments& a_;
  const ChannelChanges& changes_;
  unsigned channel_;
  int64_t count_;
  float *voxels_, *scratch_;
  cudaStream_t stream_;
  unsigned* counter_;
  State* state_;
  DeviceTotals* partials_;
};

}  // namespace

// The counter of finished blocks, the state, the blocks' totals, and room for one channel.
int64_t change_intensities_workspace_bytes(const IntensityArguments& a) {
  const int64_t count = a.shape[0] * a.shape[1] * a.shape[2];
  return kCounterBytes + kStateBytes +
         count_blocks(count) * static_cast<int64_t>(sizeof(DeviceTotals)) +
         count * static_cast<int64_t>(sizeof(float));
}

int change_intensities(const IntensityArguments& arguments, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t zeroed = cudaMemsetAsync(launch.workspace, 0, kCounterBytes, stream);
  if (zeroed != cudaSuccess) return zeroed;
  for (int c = 0; c < arguments.channels; ++c) Channel(arguments, c, launch).run();
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
