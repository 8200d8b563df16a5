// Instance normalisation of one channel, in place, with torch's roundings: mean and variance are
// summed in float64 and kept in float32, deviations are squared in float32, and scale and shift are
// one multiply-add. See block_kernels_impl.h for who includes this.

// Several sums in flight, since an addition takes longer than a load.
constexpr int kNormVectors = 4;

struct NormSums {
  static constexpr int64_t kRun = kNormVectors * Doubles::kLanes;
  Doubles sums[kNormVectors];

  NormSums() {
    for (Doubles& sum : sums) sum = Doubles::zero();
  }
  void add(const float* values, Doubles one) {
    for (int k = 0; k < kNormVectors; ++k) {
      sums[k] = fma(Doubles::widen(values + k * Doubles::kLanes), one, sums[k]);
    }
  }
  double total() const {
    double lanes[Doubles::kLanes], total = 0.0;
    for (const Doubles& sum : sums) {
      sum.store(lanes);
      total += add_lanes(lanes);
    }
    return total;
  }
};

inline Doubles ones() {
  double values[Doubles::kLanes];
  for (double& value : values) value = 1.0;
  return Doubles::load(values);
}

inline float mean_of(const float* x, int64_t size) {
  NormSums sums;
  const Doubles one = ones();
  int64_t e = 0;
  for (; e + NormSums::kRun <= size; e += NormSums::kRun) sums.add(x + e, one);
  double total = sums.total();
  for (; e < size; ++e) total += static_cast<double>(x[e]);
  return static_cast<float>(total / static_cast<double>(size));
}

inline float variance_of(const float* x, int64_t size, float mean) {
  NormSums sums;
  const Doubles one = ones();
  const Floats center = Floats::broadcast(mean);
  float squares[NormSums::kRun];
  int64_t e = 0;
  for (; e + NormSums::kRun <= size; e += NormSums::kRun) {
    for (int64_t k = 0; k < NormSums::kRun; k += Floats::kLanes) {
      const Floats deviation = Floats::load(x + e + k) - center;
      (deviation * deviation).store(squares + k);
    }
    sums.add(squares, one);
  }
  double total = sums.total();
  for (; e < size; ++e) {
    const float deviation = x[e] - mean, square = deviation * deviation;
    total += static_cast<double>(square);
  }
  return static_cast<float>(total) / static_cast<float>(size);
}

void instance_norm_block(const NormArguments& arguments, int64_t channel) {
  const int64_t size = arguments.size, c = channel % arguments.channels;
  float* x = arguments.values + channel * size;
  const float mean = mean_of(x, size);
  const double variance = variance_of(x, size, mean);
  const float inverse = static_cast<float>(1.0 / __builtin_sqrt(variance + arguments.epsilon));
  const Floats scale = Floats::broadcast(inverse * arguments.weight[c]);
  const Floats shift =
      fma(Floats::broadcast(-mean), scale, Floats::broadcast(arguments.bias[c]));
  const Floats slope = Floats::broadcast(arguments.slope);
  for (int64_t e = 0; e < size; e += Floats::kLanes) {
    const Floats y = fma(load_part(x + e, size - e), scale, shift);
    store_part(max(y, y * slope), x + e, size - e);
  }
}
