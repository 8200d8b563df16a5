// Channels over threads; the work on one is norm_impl.h's.
#include "../norm.h"

#include "dispatch.h"
#include "threads.h"

namespace fedcmt {
namespace cpu {

void instance_norm(const NormArguments& arguments, int num_threads) {
  const BlockKernels& kernels = current_kernels();
  const int64_t count = arguments.instances * arguments.channels;
#pragma omp parallel for schedule(static) num_threads(usable_threads(num_threads, count))
  for (int64_t channel = 0; channel < count; ++channel) kernels.instance_norm(arguments, channel);
}

}  // namespace cpu
}  // namespace fedcmt
