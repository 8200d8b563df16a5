// check_simulator: small kernels whose results are known. check_simulator FAULT: a kernel with that
// fault, which the simulator has to report.
#include <cstdio>
#include <cstdlib>

namespace {

constexpr unsigned kAll = 0xffffffffu;
int failures = 0;

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
         Arguments... arguments) {
  cuda_on_cpu::launch(kernel, grid, block, shared, nullptr, arguments...);
}

void expect(const char* what, double got, double expected) {
  if (got == expected) return;
  std::printf("FAILED %s: got %g, expected %g\n", what, got, expected);
  ++failures;
}

__global__ void index_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&out[block * 32 + thread], static_cast<int>(100 * block + thread));
}

__global__ void shuffle_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + threadIdx.x * 6;
  mine[0] = __shfl_down_sync(kAll, lane, 3);
  mine[1] = __shfl_up_sync(kAll, lane, 3, 8);
  mine[2] = __shfl_xor_sync(kAll, lane, 5);
  mine[3] = __shfl_sync(kAll, lane, 9, 8);
  mine[4] = __popc(__ballot_sync(kAll, lane % 3 == 0)) + 100 * __any_sync(kAll, lane == 7) +
            1000 * __all_sync(kAll, lane < 31);
  // Two halves of a warp that meet separately.
  mine[5] = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 4) : __shfl_sync(0xffff0000u, lane, 20);
}

void check_shuffles() {
  int out[64 * 6];
  run(shuffle_kernel, 1, 64, 0, &out[0]);
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32, *mine = out + thread * 6;
    expect("__shfl_down_sync", mine[0], lane + 3 < 32 ? lane + 3 : lane);
    expect("__shfl_up_sync in parts of 8", mine[1], lane % 8 >= 3 ? lane - 3 : lane);
    expect("__shfl_xor_sync", mine[2], lane ^ 5);
    expect("__shfl_sync in parts of 8", mine[3], lane / 8 * 8 + 1);
    expect("votes", mine[4], 11 + 100);
    expect("shuffle in half a warp", mine[5], lane < 16 ? 4 : 20);
  }
}

// Neighbours swap through shared memory, ordered within the warp only.
__global__ void dynamic_kernel(float* out) {
  auto* values = static_cast<float*>(cuda_on_cpu::dynamic_shared());
  out[threadIdx.x] = values[threadIdx.x];  // not set yet
  __syncwarp();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x + 32] = values[threadIdx.x ^ 1];
}

// A[i][k] = 4 i + k, B[j][k] = j - k.
__global__ void mma_kernel(double* out) {
  const int row = threadIdx.x / 4, k = threadIdx.x % 4;
  double sums[2] = {1, 2};
  cuda_on_cpu::mma_m8n8k4(4.0 * row + k, row - static_cast<double>(k), sums);
  out[threadIdx.x * 2] = sums[0];
  out[threadIdx.x * 2 + 1] = sums[1];
}

void check_mma() {
  double out[64];
  run(mma_kernel, 1, 32, 0, &out[0]);
  for (int k = 0; k < 64; ++k) {
    const int i = k / 8, j = k % 8;
    double expected = 1 + k % 2;
    for (int e = 0; e < 4; ++e) expected += (4.0 * i + e) * (j - e);
    expect("mma_m8n8k4", out[k], expected);
  }
}

int check_results() {
  int indices[2 * 3 * 32] = {};
  run(index_kernel, dim3(2, 3), dim3(4, 4, 2), 0, &indices[0]);
  for (int k = 0; k < 192; ++k) expect("indices", indices[k], 100 * (k / 32) + k % 32);
  check_shuffles();
  check_mma();
  float swapped[64];
  run(dynamic_kernel, 1, 32, 32 * sizeof(float), &swapped[0]);
  for (int k = 0; k < 32; ++k) {
    expect("unset shared memory is NaN", std::isnan(swapped[k]), 1);
    expect("swap", swapped[k + 32], k ^ 1);
  }
  run(index_kernel, 1, 1025, 0, &indices[0]);
  expect("1025 threads", cudaGetLastError(), cudaErrorInvalidConfiguration);
  expect("the error is gone", cudaGetLastError(), cudaSuccess);
  run(index_kernel, dim3(1, 0), 32, 0, &indices[0]);
  expect("no blocks", cudaGetLastError(), cudaErrorInvalidConfiguration);
  return failures;
}

__global__ void outside_mask() { __shfl_sync(0x0000ffffu, 1, 3); }
__global__ void source_outside_mask() {
  if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void exit_before_barrier() {
  if (threadIdx.x != 7) __syncthreads();
}
__global__ void different_votes() {
  if (threadIdx.x < 9) {
    __any_sync(kAll, 1);
  } else {
    __all_sync(kAll, 1);
  }
}
__global__ void large_array() {
  FEDCMT_SHARED(double, values, [6145]);
  values[0] = 1;
}

struct Fault {
  const char* name;
  void (*kernel)();
};

constexpr Fault kFaults[] = {
    {"outside_mask", outside_mask},
    {"source_outside_mask", source_outside_mask},
    {"exit_before_barrier", exit_before_barrier},
    {"different_votes", different_votes},
    {"large_array", large_array},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return check_results();
  for (const Fault& fault : kFaults) {
    if (std::strcmp(argv[1], fault.name) == 0) run(fault.kernel, 1, 64, 0);
  }
  return 0;
}
