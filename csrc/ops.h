// The two server operations, declared once for the CPU and for CUDA.
//
// Everything here is free of torch and of CUDA headers: rows are raw pointers, a stream is an
// opaque pointer. The Python side (fedcmt/ops/__init__.py) checks dtypes, devices, lengths and
// overlaps before anything arrives here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fedcmt {

// The values are part of the contract with fedcmt/ops/__init__.py.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct StepArguments {
  float* params;               // [P], updated in place
  float* momentum;             // [P], updated in place, or nullptr; then beta is 0
  const void* const* updates;  // [N] host array of rows [P]
  const float* weights;        // [N] host array
  int num_updates;             // N
  int64_t length;              // P
  Dtype dtype;                 // of the updates
  float lr;
  float beta;
};

struct StepSums {
  double momentum_squares;  // sum of m^2 after the step
  int64_t nonfinite;        // non-finite values in d = sum_i weights[i] * updates[i]
};

namespace cpu {

// gram: [N, N] float64, row major. The result does not depend on num_threads.
void gramian(const void* const* updates, int num_updates, int64_t length, Dtype dtype, double* gram,
             int num_threads);

// d = sum_i weights[i] * updates[i]; m = beta * m + d; params += lr * m.
StepSums server_step(const StepArguments& step, int num_threads);

// Instruction-set paths that this processor can run, best first ("avx512", "avx2", "plain").
std::vector<std::string> available_paths();
std::string current_path();
// Throws std::invalid_argument for a path that is unknown or that the processor lacks.
void set_path(const std::string& name);
int max_threads();

}  // namespace cpu

namespace cuda {

// All pointers but the host arrays are device pointers on `device`. Launches are asynchronous on
// `stream`. The return value is a cudaError_t as an integer, 0 for success.
int64_t gramian_workspace_bytes(int num_updates, int64_t length);
int gramian(const void* const* updates, int num_updates, int64_t length, Dtype dtype,
            void* workspace, double* gram, int device, void* stream);

// sums: device array [2] float64 that receives momentum_squares and nonfinite.
int64_t server_step_workspace_bytes(int num_updates, int64_t length);
int server_step(const StepArguments& step, void* workspace, double* sums, int device, void* stream);

const char* error_string(int error);

}  // namespace cuda
}  // namespace fedcmt
