// Threads, blocks and the reduction across them.
//
// Each segment is cut into blocks of 65,536 elements, blocks are gathered into spans, both from the
// lengths alone; the sums of the spans are added in a fixed tree. So a result is the same, bit for
// bit, for any number of threads.
#include "../ops.h"

#include <algorithm>
#include <new>

#include "dispatch.h"
#include "pages.h"
#include "threads.h"

namespace fedcmt {
namespace cpu {
namespace {

constexpr int64_t kBlock = 65536;
// Bounds the memory of the partial sums; far more than there are threads to share them.
constexpr int64_t kMaxSpansASegment = 512;

// The blocks [first, last) of one segment, the work of one thread at a time.
struct Span {
  int segment;
  int64_t first, last;
};

class Plan {
 public:
  explicit Plan(const Segments& segments) : segments_(segments) {
    for (int s = 0; s < segments.count; ++s) {
      first_span_.push_back(static_cast<int64_t>(spans_.size()));
      const int64_t length = segments.bounds[s + 1] - segments.bounds[s];
      const int64_t blocks = (length + kBlock - 1) / kBlock;
      const int64_t spans = std::min(blocks, kMaxSpansASegment);
      for (int64_t k = 0; k < spans; ++k) {
        spans_.push_back({s, k * blocks / spans, (k + 1) * blocks / spans});
      }
    }
    first_span_.push_back(static_cast<int64_t>(spans_.size()));
  }

  int64_t size() const { return static_cast<int64_t>(spans_.size()); }
  int segment(int64_t span) const { return spans_[span].segment; }

  // Calls body(begin, end) for every block of a span, in order.
  template <typename Body>
  void for_each_block(int64_t span, const Body& body) const {
    const int64_t begin = segments_.bounds[spans_[span].segment];
    const int64_t end = segments_.bounds[spans_[span].segment + 1];
    for (int64_t b = spans_[span].first; b < spans_[span].last; ++b) {
      body(begin + b * kBlock, std::min(begin + (b + 1) * kBlock, end));
    }
  }

  // Pairwise tree over the spans of a segment: add(to, from) at distance 1, 2, 4, ...; the total
  // ends in the first span. Returns that span, or -1 for an empty segment.
  template <typename Add>
  int64_t reduce(int segment, const Add& add) const {
    return reduce_range(first_span_[segment], first_span_[segment + 1], add);
  }
  template <typename Add>
  int64_t reduce_all(const Add& add) const {
    return reduce_range(0, size(), add);
  }

 private:
  template <typename Add>
  static int64_t reduce_range(int64_t first, int64_t last, const Add& add) {
    for (int64_t distance = 1; distance < last - first; distance *= 2) {
      for (int64_t s = first; s + distance < last; s += 2 * distance) add(s, s + distance);
    }
    return first < last ? first : -1;
  }

  Segments segments_;
  std::vector<Span> spans_;
  std::vector<int64_t> first_span_;  // [S + 1]
};

// Runs body(span, thread) for every span, spread over threads.
template <typename Body>
void for_each_span(const Plan& plan, int num_threads, const Body& body) {
  const int64_t spans = plan.size();
#pragma omp parallel for schedule(dynamic) num_threads(usable_threads(num_threads, spans))
  for (int64_t span = 0; span < spans; ++span) body(span, thread_index());
}

// One cache-aligned piece of memory a thread, allocated before the threads start because an
// exception must not leave a parallel region.
class Scratch {
 public:
  Scratch(int threads, int64_t doubles_each)
      : stride_((doubles_each + 7) / 8 * 8),
        data_(static_cast<double*>(
            ::operator new(sizeof(double) * stride_ * threads, std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  double* of_thread(int thread) const { return data_ + stride_ * thread; }

 private:
  int64_t stride_;
  double* data_;
};

// Upper bound over all paths: widened runs, then a vector for every entry of every tile.
int64_t gramian_scratch_size(int64_t n) {
  const int64_t padded = n + kMaxTile;
  return n * (kMaxRun + kRunPadding) + padded * padded * kMaxLanes;
}

using ProductKernel = decltype(BlockKernels::gramian);

// Sums of products over each segment: result [S, entries].
void sum_products(ProductKernel kernel, const Rows& updates, const Segments& segments,
                  int64_t entries, double* result, const Execution& execution) {
  const Plan plan(segments);
  std::vector<double> partials(plan.size() * entries, 0.0);  // [spans, entries]
  const Scratch scratch(usable_threads(execution.num_threads, plan.size()),
                        gramian_scratch_size(updates.count));
  for_each_span(plan, execution.num_threads, [&](int64_t span, int thread) {
    plan.for_each_block(span, [&](int64_t begin, int64_t end) {
      kernel(updates.pointer, updates.count, updates.dtype, begin, end, scratch.of_thread(thread),
             partials.data() + span * entries);
      if (execution.release_pages) release_pages(updates, begin, end);
    });
  });
  for (int s = 0; s < segments.count; ++s) {
    const int64_t total = plan.reduce(s, [&](int64_t to, int64_t from) {
      for (int64_t k = 0; k < entries; ++k) {
        partials[to * entries + k] += partials[from * entries + k];
      }
    });
    for (int64_t k = 0; k < entries; ++k) {
      result[s * entries + k] = total < 0 ? 0.0 : partials[total * entries + k];
    }
  }
}

}  // namespace

void gramian(const Rows& updates, const Segments& segments, double* grams,
             const Execution& execution) {
  const int64_t n = updates.count;
  sum_products(current_kernels().gramian, updates, segments, n * n, grams, execution);
  for (double* gram = grams; gram < grams + segments.count * n * n; gram += n * n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) gram[i * n + j] = gram[j * n + i];
    }
  }
}

void gramian_row(const Rows& updates, const Segments& segments, double* row,
                 const Execution& execution) {
  sum_products(current_kernels().gramian_row, updates, segments, updates.count, row, execution);
}

void server_step(const StepArguments& step, StepSums* sums, const Execution& execution) {
  const Plan plan(step.segments);
  const int64_t targets = step.num_targets;
  std::vector<StepSums> partials(plan.size() * targets, StepSums{0.0, 0});  // [spans, M]
  const BlockKernels& kernels = current_kernels();
  for_each_span(plan, execution.num_threads, [&](int64_t span, int) {
    plan.for_each_block(span, [&](int64_t begin, int64_t end) {
      kernels.server_step(step, plan.segment(span), begin, end, &partials[span * targets]);
      if (execution.release_pages) release_pages(step.updates, begin, end);
    });
  });
  const int64_t total = plan.reduce_all([&](int64_t to, int64_t from) {
    for (int64_t m = 0; m < targets; ++m) {
      partials[to * targets + m].squares += partials[from * targets + m].squares;
      partials[to * targets + m].nonfinite += partials[from * targets + m].nonfinite;
    }
  });
  for (int64_t m = 0; m < targets; ++m) {
    sums[m] = total < 0 ? StepSums{0.0, 0} : partials[total * targets + m];
  }
}

void weighted_mean(const std::vector<MeanTask>& tasks, const Execution& execution) {
  std::vector<int64_t> bounds{0};  // the tasks one after the other, as segments
  for (const MeanTask& task : tasks) bounds.push_back(bounds.back() + task.rows.length);
  const Segments segments{bounds.data(), static_cast<int>(tasks.size())};
  const Plan plan(segments);
  const BlockKernels& kernels = current_kernels();
  for_each_span(plan, execution.num_threads, [&](int64_t span, int) {
    const MeanTask& task = tasks[plan.segment(span)];
    const int64_t start = bounds[plan.segment(span)];
    plan.for_each_block(span, [&](int64_t begin, int64_t end) {
      kernels.weighted_sum(task, begin - start, end - start);
      if (execution.release_pages) release_pages(task.rows, begin - start, end - start);
    });
  });
}

ScreenSums screen(const ScreenArguments& arguments, const Execution& execution) {
  const int64_t bounds[] = {0, arguments.length};
  const Plan plan({bounds, 1});
  std::vector<ScreenSums> partials(plan.size(), ScreenSums{0, 0.0, 0.0f});
  const BlockKernels& kernels = current_kernels();
  for_each_span(plan, execution.num_threads, [&](int64_t span, int) {
    plan.for_each_block(span, [&](int64_t begin, int64_t end) {
      kernels.screen(arguments, begin, end, &partials[span]);
    });
  });
  const int64_t total = plan.reduce_all([&](int64_t to, int64_t from) {
    partials[to].nonfinite += partials[from].nonfinite;
    partials[to].squares += partials[from].squares;
    partials[to].largest = std::max(partials[to].largest, partials[from].largest);
  });
  return total < 0 ? ScreenSums{0, 0.0, 0.0f} : partials[total];
}

}  // namespace cpu
}  // namespace fedcmt
