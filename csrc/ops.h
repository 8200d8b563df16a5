// The operations on flat updates, declared once for the CPU and for CUDA.
//
// Everything here is free of torch and of CUDA headers: rows are raw pointers, a stream is an
// opaque pointer. The Python side (fedcmt/ops) checks dtypes, devices, lengths and overlaps before
// anything arrives here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedcmt {

// The values are part of the contract with fedcmt/ops.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Optimizer : int { kSgd = 0, kAdam = 1, kYogi = 2, kAdagrad = 3 };

// N updates of one dtype.
struct Rows {
  const void* const* pointer;  // [N] host array of rows [P]
  int count;                   // N >= 1
  int64_t length;              // P
  Dtype dtype;
};

// Consecutive parts of the flat layout, such as layers. Segment s is [bounds[s], bounds[s + 1]);
// bounds do not decrease, begin with 0 and end with P. One segment is the ordinary case.
struct Segments {
  const int64_t* bounds;  // [S + 1] host array
  int count;              // S >= 1
};

// One parameter vector and its own optimizer state.
struct StepTarget {
  float* params;    // [P], updated in place
  float* momentum;  // [P], updated in place, or nullptr; then beta is 0
  float* second;    // [P], updated in place; nullptr for kSgd
};

// For every target m and every element of segment s:
//   d = sum_i weights[m, s, i] * updates[i]
//   momentum = beta * momentum + gain * d
//   second   = kAdam:    beta2 * second + (1 - beta2) * d^2
//              kYogi:    second - (1 - beta2) * d^2 * sign(second - d^2)
//              kAdagrad: second + d^2
//   step     = kSgd: momentum; else momentum / (sqrt(second) + epsilon)
//   params   = params + lr * step
// With beta 0 the old momentum is not read.
struct StepArguments {
  const StepTarget* targets;  // [M] host array
  int num_targets;            // M >= 1
  Rows updates;
  Segments segments;
  const float* weights;  // [M, S, N] host array
  Optimizer optimizer;
  float lr, beta, gain, beta2, epsilon;
};

struct StepSums {
  double squares;     // sum of step^2
  int64_t nonfinite;  // non-finite values in d
};

// out = sum over the members of weights[k] * rows[k]; every task has its own rows and length.
struct MeanTask {
  float* out;       // [P]
  Rows rows;        // the members; count may be 0, then out is filled with zeros
  const float* weights;  // host array, one for each row
};

// Measures a row while it is copied: all of it is taken from the values as stored.
struct ScreenArguments {
  const void* from;  // [P]
  Dtype from_dtype;
  void* to;  // [P] or nullptr; rounded to nearest even where its dtype is narrower
  Dtype to_dtype;  // equals from_dtype where `to` is nullptr
  int64_t length;
};

struct ScreenSums {
  int64_t nonfinite;
  double squares;  // of the finite values
  float largest;   // absolute finite value
};

// How the CPU operations run. The results depend on neither.
struct Execution {
  int num_threads;
  // Rows are mapped from files: give their pages back (madvise) as soon as they have been read.
  bool release_pages;
};

namespace cpu {

// grams: [S, N, N] float64, row major.
void gramian(const Rows& updates, const Segments& segments, double* grams, const Execution&);

// row: [S, N] float64, inner products of the last update with each of the N. Equal, bit for bit, to
// the last row of `gramian`.
void gramian_row(const Rows& updates, const Segments& segments, double* row, const Execution&);

// sums: [M].
void server_step(const StepArguments& step, StepSums* sums, const Execution&);

void weighted_mean(const std::vector<MeanTask>& tasks, const Execution&);

ScreenSums screen(const ScreenArguments& arguments, const Execution&);

// Sequential projections of PCGrad on S Gram matrices [S, N, N]. coefficients: [S, N, N]; row i
// holds the projected update i in terms of the N updates. order: [N, N], row i the sequence in which
// i is projected against the others; i itself is passed over.
void project_conflicts(const double* grams, int num_grams, int num_updates, const int64_t* order,
                       double* coefficients);

// Instruction-set paths that this processor can run, best first ("avx512", "avx2", "plain").
std::vector<std::string> available_paths();
std::string current_path();
// Throws std::invalid_argument for a path that is unknown or that the processor lacks.
void set_path(const std::string& name);
int max_threads();

}  // namespace cpu

namespace cuda {

// The same operations. All pointers but those marked as host arrays are device pointers on
// `device`. Launches are asynchronous on `stream`; host arrays may be freed when a function
// returns. The return value is a cudaError_t as an integer, 0 for success. `workspace` is device
// memory of the size that the function before each operation names, at a multiple of 256 bytes.
struct Launch {
  void* workspace;
  int device;
  void* stream;
};

int64_t gramian_workspace_bytes(const Rows& updates, const Segments& segments);
int gramian(const Rows& updates, const Segments& segments, double* grams, const Launch&);

int64_t gramian_row_workspace_bytes(const Rows& updates, const Segments& segments);
int gramian_row(const Rows& updates, const Segments& segments, double* row, const Launch&);

// sums: device array [M, 2] float64 that receives squares and nonfinite.
int64_t server_step_workspace_bytes(const StepArguments& step);
int server_step(const StepArguments& step, double* sums, const Launch&);

int64_t weighted_mean_workspace_bytes(const std::vector<MeanTask>& tasks);
int weighted_mean(const std::vector<MeanTask>& tasks, const Launch&);

// sums: device array [3] float64 that receives nonfinite, squares and largest.
int64_t screen_workspace_bytes(const ScreenArguments& arguments);
int screen(const ScreenArguments& arguments, double* sums, const Launch&);

// grams, order and coefficients are device arrays here.
int project_conflicts(const double* grams, int num_grams, int num_updates, const int64_t* order,
                      double* coefficients, const Launch&);

// Kernels that this thread has launched since the last call; for tests and reports.
int64_t take_launch_count();

const char* error_string(int error);

}  // namespace cuda
}  // namespace fedcmt
