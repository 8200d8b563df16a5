#include "pool.h"

#include <algorithm>

#include "memory.h"

namespace cuda_on_cpu {
namespace {

#if defined(CUDA_ON_CPU_ASAN) || defined(CUDA_ON_CPU_TSAN)
constexpr size_t kStackBytes = size_t{256} << 10;
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif

constexpr size_t kMaxFibers = kChecksRaces ? 2048 : kMaxThreads;

constexpr size_t kMaxSlots = kMaxFibers / kWarpSize;

size_t count_slots() { return kChecksRaces ? std::min(kMaxSlots, kMaxFibers / num_threads) : 1; }

}  // namespace

Pool& Pool::instance() {
  static Pool* const pool = new Pool;  // never freed: fibers may outlive static destructors
  return *pool;
}

Pool::Pool()
    : fibers_(new Fiber[kMaxFibers]),
      stacks_(map_memory(kMaxFibers * kStackBytes)),
      arenas_(map_memory(kMaxSlots * kSharedArenaBytes)),
      ended_(new void*[kMaxSlots]) {}

void Pool::create_fibers(size_t count) {
  for (; created_ < count; ++created_) {
    create_fiber(&fibers_[created_], stacks_ + created_ * kStackBytes, kStackBytes);
  }
}

void Pool::begin_launch() {
  for (size_t slot = 0; slot < count_slots(); ++slot) ended_[slot] = nullptr;
}

Slot Pool::take(size_t block) {
  const size_t slot = block % count_slots();
  const size_t first = slot * num_threads;
  create_fibers(first + num_threads);
  for (int i = 0; i < num_threads; ++i) threads[i].fiber = &fibers_[first + i];
  return {arenas_ + slot * kSharedArenaBytes, &ended_[slot]};
}

void Pool::end_launch() {
  for (size_t slot = 0; slot < count_slots(); ++slot) {
    if (ended_[slot] != nullptr) acquire(ended_[slot]);
  }
}

}  // namespace cuda_on_cpu
