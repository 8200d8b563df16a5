// The two ways of a server step; `server_step` picks one.
#pragma once

#include "optimizer.cuh"

namespace fedcmt {
namespace cuda {

// One target, one segment, up to kMaxSingleRows updates: one launch.
constexpr int kMaxSingleRows = 256;  // 12 bytes each; kernel arguments hold 4 KiB

int64_t single_step_workspace_bytes(const StepArguments& step);
int single_step(const StepArguments& step, double* sums, const Launch& launch);

// Any number of targets, segments and updates: weights and pointers are tables in the workspace.
int64_t general_step_workspace_bytes(const StepArguments& step);
int general_step(const StepArguments& step, double* sums, const Launch& launch);

}  // namespace cuda
}  // namespace fedcmt
