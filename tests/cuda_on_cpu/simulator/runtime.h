// The part of the CUDA runtime that csrc/cuda calls, on host memory; one device, one stream.
#pragma once

#include <cuda_runtime_api.h>

namespace cuda_on_cpu {

void set_last_error(cudaError_t error);

}  // namespace cuda_on_cpu
