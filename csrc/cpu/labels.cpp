// Logits to labels in one pass: divide, interpolate, round to half precision, decide. Nothing of the
// output's size but the labels is ever stored.
//
// Labels must be those of nnU-Net, which goes through SciPy's float64 interpolation and NumPy's
// halves. Where two logits round to the same half the first one wins, so every rounding here is
// theirs: products and sums in SciPy's order, without contraction.
#include "../labels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

// The same code for wider vectors, chosen when the library is loaded. Results are equal.
#if defined(FEDCMT_X86) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FEDCMT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FEDCMT_CLONES
#endif

namespace fedcmt {
namespace cpu {
namespace {

constexpr int64_t kRowsPerPiece = 32;
constexpr float kLargestHalf = 65504.0f;

// The bits of a half are those of a float32 of 2^-112 times its value, shifted; subnormals too.
inline float half_to_float(uint16_t half) {
  const uint32_t bits = (uint32_t{half} & 0x7fffu) << 13 | (uint32_t{half} & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * 0x1p112f;
}

// Rounds to the nearest half, ties to even: at the magnitude of `shift` the last bit of a float32 is
// worth as much as that of a half at the magnitude of `value`.
inline float round_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t exponent = std::max(bits & 0x7f800000u, uint32_t{127 - 14} << 23);
  bits = (exponent + (uint32_t{13} << 23)) | (bits & 0x80000000u);
  float shift;
  std::memcpy(&shift, &bits, sizeof shift);
  return (value + shift) - shift;
}

inline float round_to_half(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint64_t magnitude = bits & 0x7ff0000000000000u, least = uint64_t{1023 - 14} << 52;
  const uint64_t exponent = magnitude > least ? magnitude : least;
  bits = (exponent + (uint64_t{42} << 52)) | (bits & 0x8000000000000000u);
  double shift;
  std::memcpy(&shift, &bits, sizeof shift);
  return static_cast<float>((value + shift) - shift);
}

// Returns whether all logits of a row are finite as halves.
FEDCMT_CLONES bool load_row(const uint16_t* logits, const uint16_t* weights, int64_t count,
                            float* row) {
  int32_t overflows = 0;
  for (int64_t x = 0; x < count; ++x) {
    row[x] = half_to_float(logits[x]);
    overflows |= !(std::fabs(row[x]) <= kLargestHalf);
  }
  if (weights != nullptr) {
    for (int64_t x = 0; x < count; ++x) {
      row[x] = round_to_half(row[x] / half_to_float(weights[x]));
      overflows |= !(std::fabs(row[x]) <= kLargestHalf);
    }
  }
  return overflows == 0;
}

FEDCMT_CLONES void scale_row(const float* row, int64_t count, double wz, double wy, double* scaled) {
  for (int64_t x = 0; x < count; ++x) scaled[x] = static_cast<double>(row[x]) * wz * wy;
}

// rows: those of one to four corners, in order.
FEDCMT_CLONES void interpolate(const double* const* rows, int num_rows, const AxisTaps& taps,
                               double* sums) {
  const int64_t count = taps.size;
  const int32_t *first = taps.first, *second = taps.second;
  const double *w0 = taps.w0, *w1 = taps.w1;
  if (num_rows == 4) {
    const double *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int64_t x = 0; x < count; ++x) {
      const int32_t i = first[x], j = second[x];
      double sum = a[i] * w0[x];
      sum += a[j] * w1[x];
      sum += b[i] * w0[x];
      sum += b[j] * w1[x];
      sum += c[i] * w0[x];
      sum += c[j] * w1[x];
      sum += d[i] * w0[x];
      sum += d[j] * w1[x];
      sums[x] = sum;
    }
    return;
  }
  std::fill(sums, sums + count, 0.0);
  for (int k = 0; k < num_rows; ++k) {
    const double* row = rows[k];
    for (int64_t x = 0; x < count; ++x) {
      double sum = sums[x] + row[first[x]] * w0[x];
      sums[x] = sum + row[second[x]] * w1[x];
    }
  }
}

FEDCMT_CLONES void keep_largest(const double* sums, int64_t count, int32_t head, float* largest,
                                int32_t* labels) {
  if (head == 0) {
    for (int64_t x = 0; x < count; ++x) largest[x] = round_to_half(sums[x]);
    std::fill(labels, labels + count, 0);
    return;
  }
  for (int64_t x = 0; x < count; ++x) {
    const float value = round_to_half(sums[x]);
    labels[x] = value > largest[x] ? head : labels[x];
    largest[x] = value > largest[x] ? value : largest[x];
  }
}

FEDCMT_CLONES void keep_region(const double* sums, int64_t count, float threshold, int32_t value,
                               int32_t* labels) {
  for (int64_t x = 0; x < count; ++x) {
    labels[x] = round_to_half(sums[x]) > threshold ? value : labels[x];
  }
}

template <typename T>
void store_row(const int32_t* labels, int64_t count, int64_t stride, T* to) {
  for (int64_t x = 0; x < count; ++x) to[x * stride] = static_cast<T>(labels[x]);
}

// What one thread needs: the normalised source rows around an output row, and that row's values.
class RowWorker {
 public:
  explicit RowWorker(const LabelArguments& arguments)
      : a_(arguments),
        width_(arguments.shape[2]),
        rows_(4 * arguments.num_heads * width_),
        scaled_(4 * width_),
        sums_(arguments.taps[2].size),
        largest_(arguments.taps[2].size),
        labels_(arguments.taps[2].size) {}

  void run(int64_t z, int64_t y) {
    const AxisTaps &tz = a_.taps[0], &ty = a_.taps[1];
    corners_ = 0;
    for (int i = 0; i < 2; ++i) {
      const double wz = i == 0 ? tz.w0[z] : tz.w1[z];
      for (int j = 0; j < 2; ++j) {
        const double wy = j == 0 ? ty.w0[y] : ty.w1[y];
        if (wz == 0.0 || wy == 0.0) continue;
        const int64_t source_z = i == 0 ? tz.first[z] : tz.second[z];
        const int64_t source_y = j == 0 ? ty.first[y] : ty.second[y];
        corner_[corners_++] = {cached(source_z, source_y), wz, wy};
      }
    }
    decide();
    store(z, y);
  }

  bool finite() const { return finite_; }

 private:
  struct Corner {
    const float* rows;  // [K, W]
    double wz, wy;
  };

  // The rows of all heads at a source position. Neighbours differ in parity, so four places do.
  const float* cached(int64_t z, int64_t y) {
    const int place = static_cast<int>((z & 1) * 2 + (y & 1));
    float* rows = rows_.data() + place * a_.num_heads * width_;
    const int64_t position = z * a_.shape[1] + y;
    if (position_[place] == position) return rows;
    position_[place] = position;
    const uint16_t* weights = nullptr;
    if (a_.weights != nullptr) {
      weights = a_.weights + z * a_.weight_strides[0] + y * a_.weight_strides[1];
    }
    for (int k = 0; k < a_.num_heads; ++k) {
      const uint16_t* logits =
          a_.logits + k * a_.logit_strides[0] + z * a_.logit_strides[1] + y * a_.logit_strides[2];
      finite_ &= load_row(logits, weights, width_, rows + k * width_);
    }
    return rows;
  }

  void decide() {
    const int64_t count = a_.taps[2].size;
    if (a_.region_values != nullptr) std::fill(labels_.begin(), labels_.end(), 0);
    for (int k = 0; k < a_.num_heads; ++k) {
      const double* rows[4];
      for (int i = 0; i < corners_; ++i) {
        double* scaled = scaled_.data() + i * width_;
        scale_row(corner_[i].rows + k * width_, width_, corner_[i].wz, corner_[i].wy, scaled);
        rows[i] = scaled;
      }
      interpolate(rows, corners_, a_.taps[2], sums_.data());
      if (a_.region_values == nullptr) {
        keep_largest(sums_.data(), count, k, largest_.data(), labels_.data());
      } else {
        keep_region(sums_.data(), count, a_.region_threshold, a_.region_values[k], labels_.data());
      }
    }
  }

  void store(int64_t z, int64_t y) const {
    const int64_t count = a_.taps[2].size;
    const int64_t offset = z * a_.label_strides[0] + y * a_.label_strides[1];
    if (a_.label_bytes == 1) {
      store_row(labels_.data(), count, a_.label_strides[2], static_cast<uint8_t*>(a_.labels) + offset);
    } else {
      store_row(labels_.data(), count, a_.label_strides[2],
                static_cast<uint16_t*>(a_.labels) + offset);
    }
  }

  const LabelArguments& a_;
  int64_t width_;
  std::vector<float> rows_;
  std::vector<double> scaled_, sums_;
  std::vector<float> largest_;
  std::vector<int32_t> labels_;
  int64_t position_[4] = {-1, -1, -1, -1};
  Corner corner_[4];
  int corners_ = 0;
  bool finite_ = true;
};

}  // namespace

bool logits_to_labels(const LabelArguments& arguments, int num_threads) {
  const int64_t depth = arguments.taps[0].size, height = arguments.taps[1].size;
  const int64_t pieces_per_slice = (height + kRowsPerPiece - 1) / kRowsPerPiece;
  const int64_t pieces = depth * pieces_per_slice;
  bool finite = true;
#pragma omp parallel num_threads(usable_threads(num_threads, pieces)) reduction(&& : finite)
  {
    RowWorker worker(arguments);
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t z = piece / pieces_per_slice, begin = piece % pieces_per_slice * kRowsPerPiece;
      for (int64_t y = begin; y < std::min(begin + kRowsPerPiece, height); ++y) worker.run(z, y);
    }
    finite = finite && worker.finite();
  }
  return finite;
}

}  // namespace cpu
}  // namespace fedcmt
