// The block that runs now: its threads, what they wait for, and who runs next.
#pragma once

#include <cstdint>

#include "engine.h"
#include "fiber.h"

namespace cuda_on_cpu {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  Fiber* fiber;
  Index index;
  int number;  // in the block
  State state;
  Site site;      // of the collective it waits in, or was in last
  uint32_t mask;  // of a warp collective
  Word deposit;   // what the other lanes may read
  Word result;
  int source_lane;  // of a shuffle
  bool fenced;      // a fence since the last atomic operation
  void* clock;      // of the collective, see ordering.h
};

extern Thread threads[kMaxThreads];
extern int num_threads;
extern Thread* current;

// Order of blocks and threads, from the environment.
class Order {
 public:
  static Order from_environment(uint64_t launch_number);
  // items: 0 to count - 1 in this order.
  void arrange(unsigned* items, unsigned count);
  bool is_random() const { return kind_ == Kind::kRandom; }

 private:
  enum class Kind { kForward, kReverse, kRandom };
  uint64_t next_random();
  Kind kind_ = Kind::kForward;
  uint64_t state_ = 0;
};

// What all threads of a block run, and the clocks around it.
struct Task {
  Body body;
  const void* arguments;
  void* begins_after[2];  // clocks or nullptr
  void* ends_before;
};

// Runs all threads to their end. They have their fibers already.
void run_block(Order* order, const Task& task);

// Lets others run until this thread is ready again.
void wait_as(State state);

}  // namespace cuda_on_cpu
