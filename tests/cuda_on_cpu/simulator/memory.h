// Shared memory of the running block.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

constexpr size_t kSharedArenaBytes = size_t{512} << 10;
constexpr size_t kMaxStaticBytes = size_t{48} << 10;    // more is an error of ptxas
constexpr size_t kMaxDynamicBytes = size_t{160} << 10;  // what the smallest data-centre GPUs have

// Gives the block an empty arena of kSharedArenaBytes with `dynamic_bytes` of dynamic memory.
void begin_shared_memory(char* arena, size_t dynamic_bytes);
// Fails where a red zone was written.
void end_shared_memory();

// A fresh address that can stand for a clock, where races are looked for.
void* new_clock();

}  // namespace cuda_on_cpu
