// OpenMP, or one thread where the compiler has none.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fedcmt {
namespace cpu {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int usable_threads(int requested, int64_t pieces) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(requested, pieces)));
}

}  // namespace cpu
}  // namespace fedcmt
