#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_on_cpu {

Index thread_index;
Thread threads[kMaxThreads];
int num_threads;
Thread* current;

namespace {

Fiber host;
Order* thread_order;
unsigned schedule[kMaxThreads];
int position;  // in the schedule
Task block_task;

// The next thread that can go on, in the order of this pass; nullptr where none can.
Thread* find_ready() {
  for (int seen = 0; seen < 2 * num_threads; ++seen) {
    if (position == num_threads) {
      position = 0;
      if (thread_order->is_random()) thread_order->arrange(schedule, num_threads);
    }
    Thread* thread = &threads[schedule[position++]];
    if (thread->state == State::kReady) return thread;
  }
  return nullptr;
}

void make_current(Thread* thread) {
  current = thread;
  thread_index = thread->index;
}

void switch_to_next(bool leaving) {
  Thread* from = current;
  Thread* to = find_ready();
  if (to != nullptr) make_current(to);
  switch_fiber(from->fiber, to != nullptr ? to->fiber : &host, leaving);
}

void thread_main() {
  begin_fiber();
  for (void* clock : block_task.begins_after) {
    if (clock != nullptr) acquire(clock);
  }
  block_task.body(block_task.arguments);
  release(block_task.ends_before);
  current->state = State::kDone;
  switch_to_next(true);
  std::abort();  // a finished thread is never resumed
}

void reset(Thread* thread, int number) {
  const unsigned n = static_cast<unsigned>(number);
  thread->number = number;
  thread->index = {n % block_size.x, n / block_size.x % block_size.y,
                   n / (block_size.x * block_size.y)};
  thread->state = State::kReady;
  thread->site = {"nothing", "", 0};
  thread->mask = 0;
  thread->fenced = false;
  prepare(thread->fiber, thread_main);
}

// Every thread waits or is done, and none can go on.
void check_all_done() {
  bool done = true, in_warp = false;
  for (int i = 0; i < num_threads; ++i) {
    done = done && threads[i].state == State::kDone;
    in_warp = in_warp || threads[i].state == State::kInWarp;
  }
  if (done) return;
  if (in_warp) fail("deadlock: lanes of a warp operation never arrive");
  fail("deadlock: not all threads reach the same __syncthreads");
}

void describe(const Thread& thread) {
  const bool waits = thread.state == State::kAtBarrier || thread.state == State::kInWarp;
  const char* state = waits ? "waits" : (thread.state == State::kDone ? "has returned" : "can run");
  std::fprintf(stderr, "  thread %d %s", thread.number, state);
  if (thread.site.line > 0) {
    std::fprintf(stderr, "%s in %s at %s:%d", waits ? "" : ", last", thread.site.operation,
                 thread.site.file, thread.site.line);
  }
  if (thread.mask != 0) std::fprintf(stderr, " with mask %08x", thread.mask);
  std::fprintf(stderr, "\n");
}

}  // namespace

void wait_as(State state) {
  current->state = state;
  switch_to_next(false);
}

void run_block(Order* order, const Task& task) {
  thread_order = order;
  block_task = task;
  adopt_host(&host);
  for (int i = 0; i < num_threads; ++i) reset(&threads[i], i);
  thread_order->arrange(schedule, static_cast<unsigned>(num_threads));
  position = 0;
  Thread* first = find_ready();
  make_current(first);
  switch_fiber(&host, first->fiber, false);
  check_all_done();
}

void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda_on_cpu: ");
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fprintf(stderr, "\n  in block (%u, %u, %u)\n", block_index.x, block_index.y, block_index.z);
  constexpr int kMaxLines = 12;
  // Threads that wait at the same place as the one before say nothing new.
  for (int i = 0, lines = 0; i < num_threads && lines < kMaxLines; ++i) {
    const bool news = i == 0 || threads[i].state != threads[i - 1].state ||
                      threads[i].mask != threads[i - 1].mask ||
                      threads[i].site.line != threads[i - 1].site.line;
    if (news) describe(threads[i]);
    lines += news;
  }
  std::fflush(stderr);
  std::abort();
}

Order Order::from_environment(uint64_t launch_number) {
  Order order;
  const char* name = std::getenv("CUDA_ON_CPU_ORDER");
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  if (name == nullptr || std::strcmp(name, "forward") == 0) {
    order.kind_ = Kind::kForward;
  } else if (std::strcmp(name, "reverse") == 0) {
    order.kind_ = Kind::kReverse;
  } else if (std::strcmp(name, "random") == 0) {
    order.kind_ = Kind::kRandom;
  } else {
    fail("CUDA_ON_CPU_ORDER should be forward, reverse or random. Got '%s'", name);
  }
  order.state_ = (seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0) * 1000003 + launch_number;
  return order;
}

// SplitMix64.
uint64_t Order::next_random() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void Order::arrange(unsigned* items, unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    items[i] = kind_ == Kind::kReverse ? count - 1 - i : i;
  }
  if (kind_ != Kind::kRandom) return;
  for (unsigned i = count; i > 1; --i) {
    const unsigned other = static_cast<unsigned>(next_random() % i);
    const unsigned moved = items[i - 1];
    items[i - 1] = items[other];
    items[other] = moved;
  }
}

}  // namespace cuda_on_cpu
