// Fibers and shared memory for the blocks of a launch, kept from one launch to the next.
//
// One block after the other uses the same ones. Where races are looked for, blocks of a launch
// should not: a thread is ordered after the one before it on the same fiber. Then there are several
// slots; not many, as the time of every operation on a clock grows with the number of fibers.
#pragma once

#include <cstddef>

#include "block.h"

namespace cuda_on_cpu {

// Where a block runs.
struct Slot {
  char* arena;   // shared memory
  void** ended;  // clock of the slot's block before this one in this launch, or nullptr
};

class Pool {
 public:
  static Pool& instance();
  void begin_launch();
  // Gives `threads` their fibers; for the block-th block to run of this launch.
  Slot take(size_t block);
  // The host goes on after all blocks.
  void end_launch();

 private:
  Pool();
  void create_fibers(size_t count);

  Fiber* fibers_;
  char* stacks_;
  char* arenas_;
  void** ended_;
  size_t created_ = 0;
};

}  // namespace cuda_on_cpu
