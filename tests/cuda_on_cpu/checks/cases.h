// Data for the checks, and their report: one line for each case.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "ops.h"

// There where the program is linked with AddressSanitizer.
extern "C" void __asan_init() __attribute__((weak));

namespace checks {

using fedcmt::Dtype;

// How much to run: sanitizers make everything slower.
enum class Effort { kTiny, kSmall, kFull };

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "unknown";
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Numbers that are the same everywhere: std::normal_distribution is not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  // Between -1 and 1.
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_) >> 11) * 0x1p-52;
  }

 private:
  uint64_t state_;
};

// Memory of an exact size: AddressSanitizer sees the first byte beyond it, and in other programs
// bytes follow that have to stay as they are. Filled with 0xff: NaN in every type.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    const auto size = static_cast<size_t>(bytes + tail_bytes());
    if (posix_memalign(&data_, 256, size) != 0) std::abort();
    std::memset(data_, 0xff, size);
  }
  ~Memory() { std::free(data_); }
  Memory(Memory&& other) : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  int64_t bytes() const { return bytes_; }
  bool is_intact() const {
    for (int64_t i = 0; i < tail_bytes(); ++i) {
      if (data()[bytes_ + i] != static_cast<char>(0xff)) return false;
    }
    return true;
  }

 private:
  static int64_t tail_bytes() { return __asan_init != nullptr ? 0 : 64; }
  void* data_;
  int64_t bytes_;
};

// A vector of T that starts `shift` elements after a multiple of 256 bytes. As with torch's tensors
// the address of nothing is null.
template <typename T>
class Array {
 public:
  explicit Array(int64_t length, int64_t shift = 0)
      : memory_((length + shift) * static_cast<int64_t>(sizeof(T))),
        length_(length),
        shift_(shift) {}
  T* data() const { return length_ == 0 ? nullptr : reinterpret_cast<T*>(memory_.data()) + shift_; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t length() const { return length_; }
  bool is_intact() const { return memory_.is_intact(); }

 private:
  Memory memory_;
  int64_t length_, shift_;
};

// The value of `dtype` nearest to x, ties to even; written without the conversions under test.
double round_to(double x, Dtype dtype);

// A row of any dtype.
class Row {
 public:
  Row(int64_t length, Dtype dtype, int64_t shift = 0)
      : memory_((length + shift) * size_of(dtype)), length_(length), shift_(shift), dtype_(dtype) {}
  void* data() const { return length_ == 0 ? nullptr : memory_.data() + shift_ * size_of(dtype_); }
  void set(int64_t i, double value);  // value: one that the dtype has
  double get(int64_t i) const;
  int64_t length() const { return length_; }
  Dtype dtype() const { return dtype_; }
  bool is_intact() const { return memory_.is_intact(); }

 private:
  Memory memory_;
  int64_t length_, shift_;
  Dtype dtype_;
};

// N rows of different scales; with `shifted` they start at places of different alignment.
class Updates {
 public:
  Updates(int count, int64_t length, Dtype dtype, bool shifted, uint64_t seed = 1);
  fedcmt::Rows view() const { return {pointers_.data(), count(), length_, dtype_}; }
  const Row& operator[](int i) const { return rows_[static_cast<size_t>(i)]; }
  Row& operator[](int i) { return rows_[static_cast<size_t>(i)]; }
  int count() const { return static_cast<int>(rows_.size()); }

 private:
  std::vector<Row> rows_;
  std::vector<const void*> pointers_;
  int64_t length_;
  Dtype dtype_;
};

// One segment, or several of odd lengths, an empty one among them.
std::vector<int64_t> make_bounds(int64_t length, bool several);

// One line of the report. A result that is not a number fails: !(error <= tolerance).
class Case {
 public:
  explicit Case(const std::string& name) : name_(name) { fedcmt::cuda::take_launch_count(); }
  ~Case();
  void status(int error);
  void near(const char* what, double got, double expected, double tolerance);
  void equal(const char* what, double got, double expected);
  void that(const char* what, bool condition);
  // Adds to the digest that has to be the same for every order of threads.
  void digest(const void* data, int64_t bytes);
  template <typename T>
  void digest(const Array<T>& array) {
    digest(array.data(), array.length() * static_cast<int64_t>(sizeof(T)));
    that("no write outside", array.is_intact());
  }
  static int failures();

 private:
  void note_failure(const char* what, double got, double expected);
  std::string name_, failure_;
  double worst_ = 0;  // largest error as a share of its tolerance
  uint64_t digest_ = 14695981039346656037u;
};

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

const std::vector<Dtype>& dtypes();

void check_gramian(Effort effort);
void check_server_step(Effort effort);
void check_weighted_mean(Effort effort);
void check_screen(Effort effort);
void check_project_conflicts(Effort effort);
void check_warp_patch(Effort effort);
void check_change_intensities(Effort effort);

}  // namespace checks
