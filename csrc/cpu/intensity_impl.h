// Intensities on the vectors of lanes_impl.h. A path provides multiply_high besides.

typedef float HalfFloats __attribute__((vector_size(2 * kVectorLanes)));
typedef double HalfDoubles __attribute__((vector_size(4 * kVectorLanes)));

// Least, largest and sums of what it is shown, in a fixed order.
class Measure {
 public:
  void add(FloatVector x, int64_t count) {
    if (count < kVectorLanes) {
      for (int k = 0; k < count; ++k) add_one(x[k]);
      return;
    }
    least_ = x < least_ ? x : least_;
    largest_ = x > largest_ ? x : largest_;
    HalfFloats half[2];
    __builtin_memcpy(half, &x, sizeof x);
    for (int k = 0; k < 2; ++k) {
      const HalfDoubles wide = __builtin_convertvector(half[k], HalfDoubles);
      sum_[k] += wide;
      squares_[k] += wide * wide;
    }
  }

  Totals totals() const {
    Totals all = rest_;
    for (int k = 0; k < kVectorLanes; ++k) {
      all.least = least_[k] < all.least ? least_[k] : all.least;
      all.largest = largest_[k] > all.largest ? largest_[k] : all.largest;
    }
    for (int k = 0; k < kVectorLanes / 2; ++k) {
      all.sum += sum_[0][k] + sum_[1][k];
      all.squares += squares_[0][k] + squares_[1][k];
    }
    return all;
  }

 private:
  void add_one(float x) {
    rest_.least = x < rest_.least ? x : rest_.least;
    rest_.largest = x > rest_.largest ? x : rest_.largest;
    rest_.sum += x;
    rest_.squares += static_cast<double>(x) * x;
  }

  FloatVector least_ = FloatVector{} + __builtin_inff();
  FloatVector largest_ = FloatVector{} - __builtin_inff();
  HalfDoubles sum_[2] = {}, squares_[2] = {};
  Totals rest_ = {__builtin_inff(), -__builtin_inff(), 0.0, 0.0};
};

// Stores and, where asked for, measures values one vector after the other.
class Writer {
 public:
  Writer(float* to, Totals* totals) : to_(to), totals_(totals) {}
  ~Writer() {
    if (totals_ != nullptr) *totals_ = measure_.totals();
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void write(FloatVector x, int64_t at, int64_t count) {
    store_vector_part(x, to_ + at, count);
    if (totals_ != nullptr) measure_.add(x, count);
  }

 private:
  float* to_;
  Totals* totals_;
  Measure measure_;
};

// --- functions of one value ---

inline FloatVector select(IntVector mask, FloatVector yes, FloatVector no) { return mask ? yes : no; }

inline FloatVector square_root(FloatVector x) {
  return (FloatVector)Floats{(decltype(Floats::v))x}.sqrt().v;
}

// ln(x) for positive normal x, to 1e-7 of the larger of 1 and the result: Cephes' logf.
inline FloatVector natural_log(FloatVector x) {
  const IntVector bits = (IntVector)x;
  const IntVector exponent = (bits - 0x3f3504f3) >> 23;  // the rest lies in [sqrt(1/2), sqrt(2))
  const FloatVector t = (FloatVector)(bits - (exponent << 23)) - 1.0f;
  FloatVector p = t * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * t + 1.1676998740e-1f;
  p = p * t - 1.2420140846e-1f;
  p = p * t + 1.4249322787e-1f;
  p = p * t - 1.6668057665e-1f;
  p = p * t + 2.0000714765e-1f;
  p = p * t - 2.4999993993e-1f;
  p = p * t + 3.3333331174e-1f;
  const FloatVector square = t * t, e = to_floats(exponent);
  return (p * t * square + e * -2.12194440e-4f - square * 0.5f + t) + e * 0.693359375f;
}

inline FloatVector round_nearest(FloatVector x) {  // |x| below 2^22
  const FloatVector magic = FloatVector{} + 12582912.0f;
  return (x + magic) - magic;
}

// 2^x for x <= 0, 0 below 2^-126.
inline FloatVector power_of_two(FloatVector x) {
  const FloatVector least = FloatVector{} - 126.0f;
  const FloatVector limited = x > least ? x : least;
  const FloatVector whole = round_nearest(limited), f = limited - whole;
  FloatVector p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const IntVector exponent = (__builtin_convertvector(whole, IntVector) + 127) << 23;
  return select(x < least, FloatVector{}, p * (FloatVector)exponent);
}

inline FloatVector change_point(const PointChange& change, FloatVector x) {
  const FloatVector u = x * change.scale + change.shift;
  if (change.kind == PointChange::kLinear) return u;
  if (change.kind == PointChange::kStretch) {
    const FloatVector low = FloatVector{} + change.low, high = FloatVector{} + change.high;
    const FloatVector above = u > low ? u : low;
    return above < high ? above : high;
  }
  const FloatVector one = FloatVector{} + 1.0f, tiny = FloatVector{} + 0x1p-126f;
  FloatVector base = (u - change.low) / change.width;
  base = base < one ? base : one;
  const FloatVector log2 = natural_log(base > tiny ? base : tiny) * 1.44269504088896341f;
  return select(base < tiny, FloatVector{}, power_of_two(log2 * change.exponent));
}

void change_points(const PointChange& change, int64_t size, float* voxels, Totals* totals) {
  Writer writer(voxels, totals);
  for (int64_t e = 0; e < size; e += kVectorLanes) {
    const FloatVector x = load_vector_part(voxels + e, size - e, 0.0f);
    const bool changes = change.kind != PointChange::kNothing;
    writer.write(changes ? change_point(change, x) : x, e, size - e);
  }
}

// --- filters ---

inline int64_t fold(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  i %= period;
  if (i < 0) i += period;
  return i < size ? i : period - i;
}

void filter_row(const float* from, int64_t width, Filter filter, float* row, float* to) {
  const int radius = filter.radius;
  for (int k = 0; k < radius; ++k) {
    row[k] = from[fold(k - radius, width)];
    row[radius + width + k] = from[fold(width + k, width)];
  }
  __builtin_memcpy(row + radius, from, width * sizeof(float));
  for (int64_t x = 0; x < width; x += kVectorLanes) {
    FloatVector sum = load_vector(row + x) * filter.taps[0];
    for (int k = 1; k <= 2 * radius; ++k) sum += load_vector(row + x + k) * filter.taps[k];
    store_vector_part(sum, to + x, width - x);
  }
}

void add_planes(const float* const* planes, const float* weights, int count, int64_t size, float* to,
                Totals* totals) {
  Writer writer(to, totals);
  for (int64_t e = 0; e < size; e += kVectorLanes) {
    FloatVector sum = load_vector_part(planes[0] + e, size - e, 0.0f) * weights[0];
    for (int k = 1; k < count; ++k) {
      sum += load_vector_part(planes[k] + e, size - e, 0.0f) * weights[k];
    }
    writer.write(sum, e, size - e);
  }
}

void filter_plane(const float* from, int64_t height, int64_t width, Filter along_h, Filter along_w,
                  float* row, float* rows, float* to) {
  float* filtered = along_h.taps == nullptr ? to : rows;
  for (int64_t y = 0; y < height; ++y) {
    if (along_w.taps == nullptr) {
      __builtin_memcpy(filtered + y * width, from + y * width, width * sizeof(float));
    } else {
      filter_row(from + y * width, width, along_w, row, filtered + y * width);
    }
  }
  if (along_h.taps == nullptr) return;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; x += kVectorLanes) {
      FloatVector sum = {};
      for (int k = -along_h.radius; k <= along_h.radius; ++k) {
        const float* line = rows + fold(y + k, height) * width + x;
        sum += load_vector_part(line, width - x, 0.0f) * along_h.taps[along_h.radius + k];
      }
      store_vector_part(sum, to + y * width + x, width - x);
    }
  }
}

// --- low resolution ---

void enlarge_plane(const float* small, int64_t small_width, int64_t height, int64_t width,
                   Steps along_h, Steps along_w, float* row, float* to, Totals* totals) {
  Writer writer(to, totals);
  for (int64_t y = 0; y < height; ++y) {
    const float* first = small + along_h.first[y] * small_width;
    const float* next = small + along_h.next[y] * small_width;
    const float share = along_h.share[y];
    for (int64_t x = 0; x < small_width; x += kVectorLanes) {
      const FloatVector a = load_vector_part(first + x, small_width - x, 0.0f);
      const FloatVector b = load_vector_part(next + x, small_width - x, 0.0f);
      store_vector_part(a * (1.0f - share) + b * share, row + x, small_width - x);
    }
    row[small_width] = row[small_width - 1];  // the neighbour of the last one, without weight
    for (int64_t x = 0; x < width; x += kVectorLanes) {
      const int64_t count = width - x < kVectorLanes ? width - x : kVectorLanes;
      IntVector at = {};
      __builtin_memcpy(&at, along_w.first + x, count * sizeof(int32_t));
      const FloatVector part = load_vector_part(along_w.share + x, count, 0.0f);
      FloatVector a, b;
      gather_two(row, at, &a, &b);
      writer.write(a * (1.0f - part) + b * part, y * width + x, count);
    }
  }
}

// --- noise ---

struct Words {
  UintVector word[4];
};

// Philox4x32-10 for the counters (first + lane, 0, channel, 0).
inline Words philox(uint32_t first, uint32_t channel, uint64_t seed) {
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  Words w = {};
  for (int k = 0; k < kVectorLanes; ++k) w.word[0][k] = first + k;
  w.word[2] += channel;
  for (int round = 0; round < 10; ++round) {
    const UintVector high0 = multiply_high(w.word[0], 0xd2511f53u), low0 = w.word[0] * 0xd2511f53u;
    const UintVector high1 = multiply_high(w.word[2], 0xcd9e8d57u), low1 = w.word[2] * 0xcd9e8d57u;
    w.word[0] = high1 ^ w.word[1] ^ key0;
    w.word[1] = low1;
    w.word[2] = high0 ^ w.word[3] ^ key1;
    w.word[3] = low0;
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return w;
}

// Two independent normal numbers from 24 bits of each word.
inline void box_muller(UintVector radius_word, UintVector angle_word, FloatVector* first,
                       FloatVector* second) {
  const FloatVector uniform = (to_floats((IntVector)(radius_word >> 8)) + 1.0f) * 0x1p-24f;
  const FloatVector radius = square_root(natural_log(uniform) * -2.0f);
  const FloatVector turn = to_floats((IntVector)(angle_word >> 8)) * 0x1p-22f;  // quarters
  const FloatVector quarter = round_nearest(turn), x = (turn - quarter) * 1.57079632679489662f;
  const FloatVector s = x * x;
  const FloatVector sine =
      x + x * s * ((s * -1.9515295891e-4f + 8.3321608736e-3f) * s - 1.6666654611e-1f);
  const FloatVector cosine =
      1.0f - s * 0.5f +
      s * s * ((s * 2.443315711809948e-5f - 1.388731625493765e-3f) * s + 4.166664568298827e-2f);
  const IntVector q = __builtin_convertvector(quarter, IntVector);
  const IntVector odd = (q & 1) != 0;
  const FloatVector c = odd ? sine : cosine, d = odd ? cosine : sine;
  *first = radius * select(((q + 1) & 2) != 0, -c, c);
  *second = radius * select((q & 2) != 0, -d, d);
}

void add_noise(float* voxels, int64_t begin, int64_t end, float sigma, uint64_t seed,
               uint32_t channel) {
  for (int64_t block = begin; block < end; block += kNoiseBlock) {
    for (int lane = 0; lane < kNoiseLanes; lane += kVectorLanes) {
      const Words w =
          philox(static_cast<uint32_t>(block / kNoiseBlock * kNoiseLanes + lane), channel, seed);
      FloatVector normal[4];
      box_muller(w.word[0], w.word[1], &normal[0], &normal[1]);
      box_muller(w.word[2], w.word[3], &normal[2], &normal[3]);
      for (int k = 0; k < 4; ++k) {
        const int64_t at = block + k * kNoiseLanes + lane;
        if (at >= end) break;
        const FloatVector x = load_vector_part(voxels + at, end - at, 0.0f);
        store_vector_part(x + normal[k] * sigma, voxels + at, end - at);
      }
    }
  }
}

constexpr IntensityKernels kIntensityKernels = {add_noise, filter_plane, add_planes, change_points,
                                                enlarge_plane};
