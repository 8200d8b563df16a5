// Shuffles, ballots and barriers. The thread that arrives last completes a collective for all.
#include <cstring>

#include "block.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

// Values that `exchange` hands out. A lane reads them before it arrives at its next collective, so
// two for each warp are enough.
Word exchanged[kMaxThreads / kWarpSize][2][kWarpSize];
unsigned exchanges[kMaxThreads / kWarpSize];

constexpr uint32_t kFullMask = 0xffffffffu;

int at_barrier;  // threads of the block that wait
void* barrier_clock;

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && same_text(a.file, b.file) && same_text(a.operation, b.operation);
}

Thread* warp_of(const Thread* thread) { return &threads[thread->number / kWarpSize * kWarpSize]; }

bool is_member(uint32_t mask, int lane) { return (mask >> lane & 1) != 0; }

// The clock of the collective that this lane arrives at: one that waits there already has it.
void* clock_of_warp(uint32_t mask, const Site& site) {
  const Thread* warp = warp_of(current);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const bool waits = warp + lane < threads + num_threads && warp[lane].state == State::kInWarp;
    if (waits && warp[lane].mask == mask && same_site(warp[lane].site, site)) {
      return warp[lane].clock;
    }
  }
  return new_clock();
}

// True for the last lane to arrive, which completes the operation and then calls wake_warp; the
// others return once that has happened.
bool arrive_in_warp(uint32_t mask, const Site& site) {
  Thread* self = current;
  self->site = site;
  self->mask = mask;
  if (!is_member(mask, self->number % kWarpSize)) {
    fail("thread %d calls %s at %s:%d, but is not in its mask %08x", self->number, site.operation,
         site.file, site.line, mask);
  }
  self->state = State::kInWarp;
  const Thread* warp = warp_of(self);
  for (int step = 1; step < kWarpSize; ++step) {  // the next lanes are the likeliest to be missing
    const int lane = (self->number + step) % kWarpSize;
    if (!is_member(mask, lane)) continue;
    const Thread& other = warp[lane];
    const bool arrived = &other < threads + num_threads && other.state == State::kInWarp &&
                         other.mask == mask && same_site(other.site, site);
    if (!arrived) {
      wait_as(State::kInWarp);
      return false;
    }
  }
  return true;
}

void wake_warp(uint32_t mask) {
  Thread* warp = warp_of(current);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (is_member(mask, lane)) warp[lane].state = State::kReady;
  }
}

void wake_block(const Site& site) {
  for (int i = 0; i < num_threads; ++i) {
    if (!same_site(threads[i].site, site)) fail("threads wait at different __syncthreads");
  }
  for (int i = 0; i < num_threads; ++i) threads[i].state = State::kReady;
  at_barrier = 0;
}

}  // namespace

int lane() { return current->number % kWarpSize; }

Word shuffle(uint32_t mask, const Word& value, int source_lane, const Site& site) {
  Thread* self = current;
  self->deposit = value;
  self->source_lane = source_lane;
  if (!is_member(mask, source_lane)) {
    fail("%s at %s:%d reads lane %d, which is not in its mask %08x", site.operation, site.file,
         site.line, source_lane, mask);
  }
  if (arrive_in_warp(mask, site)) {
    Thread* warp = warp_of(self);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (is_member(mask, lane)) warp[lane].result = warp[warp[lane].source_lane].deposit;
    }
    wake_warp(mask);
  }
  return self->result;
}

uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  Thread* self = current;
  self->deposit.part[0] = predicate;
  if (arrive_in_warp(mask, site)) {
    Thread* warp = warp_of(self);
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (is_member(mask, lane) && warp[lane].deposit.part[0] != 0) bits |= uint32_t{1} << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) warp[lane].result.part[0] = bits;
    wake_warp(mask);
  }
  return static_cast<uint32_t>(self->result.part[0]);
}

const Word* exchange(const Word& value, const Site& site) {
  Thread* self = current;
  const int warp_number = self->number / kWarpSize;
  self->deposit = value;
  if (arrive_in_warp(kFullMask, site)) {
    const Thread* warp = warp_of(self);
    const unsigned turn = ++exchanges[warp_number] % 2;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      exchanged[warp_number][turn][lane] = warp[lane].deposit;
    }
    wake_warp(kFullMask);
  }
  return exchanged[warp_number][exchanges[warp_number] % 2];
}

// Shuffles and ballots order no memory accesses, this does.
void sync_warp(uint32_t mask, const Site& site) {
  Thread* self = current;
  self->clock = clock_of_warp(mask, site);
  release(self->clock);
  if (arrive_in_warp(mask, site)) wake_warp(mask);
  acquire(self->clock);
}

void sync_block(const Site& site) {
  Thread* self = current;
  self->site = site;
  self->mask = 0;
  self->clock = at_barrier == 0 ? new_clock() : barrier_clock;
  barrier_clock = self->clock;
  release(self->clock);
  if (++at_barrier == num_threads) {
    self->state = State::kAtBarrier;
    wake_block(site);
  } else {
    wait_as(State::kAtBarrier);
  }
  acquire(self->clock);
}

void fence() { current->fenced = true; }

bool take_fence() {
  const bool fenced = current->fenced;
  current->fenced = false;
  return fenced;
}

}  // namespace cuda_on_cpu
