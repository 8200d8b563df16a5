#include "cases.h"

#include <algorithm>
#include <cstdarg>

namespace checks {
namespace {

int failed_cases = 0;

}  // namespace

double round_to(double x, Dtype dtype) {
  if (!std::isfinite(x) || x == 0) return x;
  struct Format {
    int mantissa_bits, least_exponent;
    double largest;
  };
  const Format format = dtype == Dtype::kFloat32    ? Format{23, -126, 0x1.fffffep127}
                        : dtype == Dtype::kBFloat16 ? Format{7, -126, 0x1.fep127}
                                                    : Format{10, -14, 65504.0};
  const int exponent = std::max(std::ilogb(x), format.least_exponent);
  const double unit = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::fabs(rounded) <= format.largest ? rounded : std::copysign(HUGE_VAL, x);
}

void Row::set(int64_t i, double value) {
  const float x = static_cast<float>(value);
  switch (dtype_) {
    case Dtype::kFloat32:
      static_cast<float*>(data())[i] = x;
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16_rn(x);
      break;
    case Dtype::kFloat16:
      static_cast<__half*>(data())[i] = __float2half_rn(x);
      break;
  }
}

double Row::get(int64_t i) const {
  switch (dtype_) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data())[i];
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data())[i]);
    case Dtype::kFloat16:
      return __half2float(static_cast<const __half*>(data())[i]);
  }
  return kNaN;
}

Updates::Updates(int count, int64_t length, Dtype dtype, bool shifted, uint64_t seed)
    : length_(length), dtype_(dtype) {
  Random random(seed * 1000 + static_cast<uint64_t>(count));
  for (int n = 0; n < count; ++n) {
    rows_.emplace_back(length, dtype, shifted ? n % 3 + 1 : 0);
    const double scale = 0.5 + n % 4;
    for (int64_t e = 0; e < length; ++e) {
      rows_.back().set(e, round_to(scale * random.next(), dtype));
    }
    pointers_.push_back(rows_.back().data());
  }
}

std::vector<int64_t> make_bounds(int64_t length, bool several) {
  if (!several) return {0, length};
  const int64_t third = std::min(length, length / 3 / 2 * 2 + 1);
  const int64_t middle = std::max(third, length / 2);
  return {0, std::min<int64_t>(length, 1), third, third, middle, length};
}

Case::~Case() {
  const bool failed = !failure_.empty();
  failed_cases += failed;
  std::printf("%s %s: worst error %.3f of its tolerance, %lld launches, digest %016llx%s\n",
              failed ? "FAILED" : "ok", name_.c_str(), worst_,
              static_cast<long long>(fedcmt::cuda::take_launch_count()),
              static_cast<unsigned long long>(digest_), failure_.c_str());
  std::fflush(stdout);
}

int Case::failures() { return failed_cases; }

void Case::note_failure(const char* what, double got, double expected) {
  if (failure_.empty()) failure_ = format("\n  %s: got %.17g, expected %.17g", what, got, expected);
}

void Case::status(int error) {
  if (error != 0) note_failure(fedcmt::cuda::error_string(error), error, 0);
}

void Case::near(const char* what, double got, double expected, double tolerance) {
  const double error = std::fabs(got - expected);
  if (!(error <= tolerance)) note_failure(what, got, expected);
  if (tolerance > 0) worst_ = std::max(worst_, error / tolerance);
}

void Case::equal(const char* what, double got, double expected) {
  const bool same = got == expected || (std::isnan(got) && std::isnan(expected));
  if (!same) note_failure(what, got, expected);
}

void Case::that(const char* what, bool condition) {
  if (!condition) note_failure(what, 0, 1);
}

void Case::digest(const void* data, int64_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(data);
  for (int64_t i = 0; i < bytes; ++i) digest_ = (digest_ ^ byte[i]) * 1099511628211u;
}

std::string format(const char* text, ...) {
  char line[256];
  va_list values;
  va_start(values, text);
  std::vsnprintf(line, sizeof line, text, values);
  va_end(values);
  return line;
}

const std::vector<Dtype>& dtypes() {
  static const std::vector<Dtype> all{Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  return all;
}

}  // namespace checks
