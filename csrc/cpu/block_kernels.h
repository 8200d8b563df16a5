// What one instruction-set path offers: the work on one block of elements, on one thread.
//
// Threads, blocks and reductions across blocks live in ops.cpp, compiled for the baseline
// processor. A path is compiled with its own instruction set, so its source may define nothing that
// the linker could merge with baseline code: internal linkage throughout, no std:: templates.
#pragma once

#include <cstdint>

#include "../norm.h"
#include "../ops.h"
#include "../patch.h"
#include "intensity_kernels.h"

namespace fedcmt {
namespace cpu {

// Most elements of a row that are widened to float64 at a time.
constexpr int kMaxRun = 256;
constexpr int kRunPadding = 8;
// Widest float64 vector of any path, and the largest register tile; both size the scratch memory.
constexpr int kMaxLanes = 8;
constexpr int kMaxTile = 4;

struct BlockKernels {
  const char* name;

  // pairs[i * n + j] += sum_e rows[i][e] * rows[j][e] for j >= i and e in [begin, end).
  // scratch: 64-byte aligned memory of this thread, sized in ops.cpp, contents ignored.
  void (*gramian)(const void* const* rows, int n, Dtype dtype, int64_t begin, int64_t end,
                  double* scratch, double* pairs);

  // products[i] += sum_e rows[i][e] * rows[n - 1][e]; scratch as above.
  void (*gramian_row)(const void* const* rows, int n, Dtype dtype, int64_t begin, int64_t end,
                      double* scratch, double* products);

  // The fused step of every target on elements [begin, end) of one segment; adds to sums [M].
  void (*server_step)(const StepArguments& step, int segment, int64_t begin, int64_t end,
                      StepSums* sums);

  void (*weighted_sum)(const MeanTask& task, int64_t begin, int64_t end);

  // Adds to sums.
  void (*screen)(const ScreenArguments& arguments, int64_t begin, int64_t end, ScreenSums* sums);

  // Rows [begin, end) of the D' * H' of a warped patch, all channels.
  void (*warp_rows)(const WarpArguments& arguments, int64_t begin, int64_t end);

  const IntensityKernels* intensities;

  // Channel counts from 0 to instances * channels.
  void (*instance_norm)(const NormArguments& arguments, int64_t channel);
};

extern const BlockKernels kPlainKernels;
#ifdef FEDCMT_X86
extern const BlockKernels kAvx2Kernels;
extern const BlockKernels kAvx512Kernels;
#endif

}  // namespace cpu
}  // namespace fedcmt
