// What callers ask about launches.
#include "device.cuh"

namespace fedcmt {
namespace cuda {

int64_t take_launch_count() {
  const int64_t count = launch_count();
  launch_count() = 0;
  return count;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace fedcmt
