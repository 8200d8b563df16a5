// The simulator's engine: what the CUDA language layer (simulator.h) asks of it.
//
// One fiber stands for one CUDA thread, blocks run one after the other, and a thread runs until it
// waits in a collective. The engine is compiled without sanitizers, whatever the kernels are
// compiled with: its own bookkeeping never shows up in a report, and it tells ThreadSanitizer by
// hand which operations order threads (ordering.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};

// Where a kernel calls a collective.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

// A value that travels between lanes: up to 32 bytes.
struct Word {
  uint64_t part[4];
};

// Of the thread that runs now; kernels see them as threadIdx, blockIdx, blockDim and gridDim.
extern Index thread_index;
extern Index block_index;
extern Index block_size;
extern Index grid_size;

// --- collectives ---
// Every lane of the mask has to arrive, at the same site and with the same mask.

Word shuffle(uint32_t mask, const Word& value, int source_lane, const Site& site);
uint32_t ballot(uint32_t mask, bool predicate, const Site& site);
// Values of all 32 lanes, all of which take part; valid until this lane's next collective.
const Word* exchange(const Word& value, const Site& site);
void sync_warp(uint32_t mask, const Site& site);
void sync_block(const Site& site);
int lane();

// --- memory ---

// The block's array that `key` stands for: filled with 0xff (NaN in every floating-point type) when
// first asked for, between red zones that are checked when the block ends.
void* shared_array(const void* key, size_t bytes, const char* name);
// The dynamic shared memory of the launch.
void* dynamic_shared();

// A fence lets the thread's next atomic operation publish what the thread has written.
void fence();
bool take_fence();

// --- launches ---

using Body = void (*)(const void* arguments);
// Runs body(arguments) in every thread. A wrong configuration becomes cudaGetLastError's result.
void run_grid(Index grid, Index block, size_t dynamic_bytes, Body body, const void* arguments);

// Prints the message and the state of the block's threads, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cuda_on_cpu
