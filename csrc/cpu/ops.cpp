// Threads, blocks and the reduction across them.
//
// Work is cut into blocks of 65,536 elements, blocks into spans, both from the length alone; the
// sums of the spans are added in a fixed tree. So a result is the same, bit for bit, for any number
// of threads.
#include "../ops.h"

#include <algorithm>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dispatch.h"

namespace fedcmt {
namespace cpu {
namespace {

constexpr int64_t kBlock = 65536;
// Bounds the memory of the partial sums; far more than there are threads to share them.
constexpr int64_t kMaxSpans = 512;

int64_t count_blocks(int64_t length) { return (length + kBlock - 1) / kBlock; }
int64_t count_spans(int64_t length) { return std::min(count_blocks(length), kMaxSpans); }

// Calls body(block_begin, block_end) for every block of a span, in order.
template <typename Body>
void for_each_block(int64_t span, int64_t spans, int64_t length, const Body& body) {
  const int64_t blocks = count_blocks(length);
  for (int64_t b = span * blocks / spans; b < (span + 1) * blocks / spans; ++b) {
    body(b * kBlock, std::min((b + 1) * kBlock, length));
  }
}

// Pairwise tree: add(to, from) for spans at distance 1, 2, 4, ...; the total ends in span 0.
template <typename Add>
void reduce_tree(int64_t spans, const Add& add) {
  for (int64_t distance = 1; distance < spans; distance *= 2) {
    for (int64_t s = 0; s + distance < spans; s += 2 * distance) add(s, s + distance);
  }
}

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int usable_threads(int requested, int64_t spans) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(requested, spans)));
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
  return n * kRun + padded * padded * kMaxLanes;
}

}  // namespace

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

void gramian(const void* const* updates, int num_updates, int64_t length, Dtype dtype, double* gram,
             int num_threads) {
  const int64_t n = num_updates, entries = n * n;
  const int64_t spans = std::max<int64_t>(1, count_spans(length));
  const int threads = usable_threads(num_threads, spans);
  std::vector<double> partials(spans * entries, 0.0);  // [spans, N, N], upper triangles
  const Scratch scratch(threads, gramian_scratch_size(n));
  const BlockKernels& kernels = current_kernels();

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t span = 0; span < spans; ++span) {
    for_each_block(span, spans, length, [&](int64_t begin, int64_t end) {
      kernels.gramian(updates, num_updates, dtype, begin, end, scratch.of_thread(thread_index()),
                      partials.data() + span * entries);
    });
  }
  reduce_tree(spans, [&](int64_t to, int64_t from) {
    for (int64_t k = 0; k < entries; ++k) {
      partials[to * entries + k] += partials[from * entries + k];
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) gram[i * n + j] = gram[j * n + i] = partials[i * n + j];
  }
}

StepSums server_step(const StepArguments& step, int num_threads) {
  const int64_t spans = std::max<int64_t>(1, count_spans(step.length));
  const int threads = usable_threads(num_threads, spans);
  std::vector<StepSums> partials(spans, StepSums{0.0, 0});
  const BlockKernels& kernels = current_kernels();

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t span = 0; span < spans; ++span) {
    for_each_block(span, spans, step.length, [&](int64_t begin, int64_t end) {
      kernels.server_step(step, begin, end, &partials[span]);
    });
  }
  reduce_tree(spans, [&](int64_t to, int64_t from) {
    partials[to].momentum_squares += partials[from].momentum_squares;
    partials[to].nonfinite += partials[from].nonfinite;
  });
  return partials[0];
}

}  // namespace cpu
}  // namespace fedcmt
