#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "threads.h"

namespace fedcmt {
namespace cpu {
namespace {

// Best first. The builtins read cpuid and also ask whether the system saves the wide registers.
std::vector<const BlockKernels*> supported_kernels() {
  std::vector<const BlockKernels*> kernels;
#ifdef FEDCMT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) kernels.push_back(&kAvx512Kernels);
  if (avx2) kernels.push_back(&kAvx2Kernels);
#endif
  kernels.push_back(&kPlainKernels);
  return kernels;
}

std::atomic<const BlockKernels*>& chosen() {
  static std::atomic<const BlockKernels*> kernels{supported_kernels().front()};
  return kernels;
}

}  // namespace

const BlockKernels& current_kernels() { return *chosen().load(); }

std::vector<std::string> available_paths() {
  std::vector<std::string> names;
  for (const BlockKernels* kernels : supported_kernels()) names.emplace_back(kernels->name);
  return names;
}

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

std::string current_path() { return current_kernels().name; }

void set_path(const std::string& name) {
  std::string known;
  for (const BlockKernels* kernels : supported_kernels()) {
    if (name == kernels->name) {
      chosen().store(kernels);
      return;
    }
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("CPU path should be one of " + known + ". Got '" + name + "'");
}

}  // namespace cpu
}  // namespace fedcmt
