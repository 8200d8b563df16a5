// Weighted sums and the server's step on a block. See block_kernels_impl.h for who includes this.
//
// A run of d stays in the innermost cache between summing the rows and using the sum, so that any
// number of rows is read in groups of 8 streams, and rows that serve several targets are read from
// memory once.

constexpr int kStepRun = 1024;  // 4 KiB of d
constexpr int kGroup = 8;       // rows that are summed at a time

// d[0, count) (+)= sum_i weights[i] * rows[i][0, count), rows in order; d is padded to whole vectors.
template <int kRows, typename T>
inline void add_group(const T* const* rows, int64_t offset, const float* weights, bool first,
                      int count, float* d) {
  constexpr int kVectors = 4;  // independent sums in flight
  constexpr int kLanes = Floats::kLanes;
  int e = 0;
  for (; e + kVectors * kLanes <= count; e += kVectors * kLanes) {
    Floats sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = first ? Floats::broadcast(0.0f) : Floats::load(d + e + v * kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const Floats weight = Floats::broadcast(weights[i]);
      for (int v = 0; v < kVectors; ++v) {
        sum[v] = fma(weight, Floats::load(rows[i] + offset + e + v * kLanes), sum[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) sum[v].store(d + e + v * kLanes);
  }
  for (; e < count; e += kLanes) {
    Floats sum = first ? Floats::broadcast(0.0f) : Floats::load(d + e);
    for (int i = 0; i < kRows; ++i) {
      sum = fma(Floats::broadcast(weights[i]), load_part(rows[i] + offset + e, count - e), sum);
    }
    sum.store(d + e);
  }
}

template <int kRows = 1, typename T>
inline void add_last_group(const T* const* rows, int num_rows, int64_t offset, const float* weights,
                           bool first, int count, float* d) {
  if constexpr (kRows <= kGroup) {
    if (num_rows == kRows) return add_group<kRows>(rows, offset, weights, first, count, d);
    add_last_group<kRows + 1>(rows, num_rows, offset, weights, first, count, d);
  }
}

template <typename T>
inline void add_rows(const T* const* rows, int num_rows, int64_t offset, const float* weights,
                     int count, float* d) {
  int i = 0;
  for (; i + kGroup < num_rows; i += kGroup) {
    add_group<kGroup>(rows + i, offset, weights + i, i == 0, count, d);
  }
  add_last_group(rows + i, num_rows - i, offset, weights + i, i == 0, count, d);
}

struct StepAccumulator {
  Doubles squares[2] = {Doubles::zero(), Doubles::zero()};
  int64_t nonfinite = 0;
};

// Second moment from its old value and d (FedOpt, arXiv 2003.00295, algorithm 2).
template <Optimizer kOptimizer>
inline Floats next_second(Floats second, Floats d, const StepArguments& step) {
  const Floats squares = d * d;
  if (kOptimizer == Optimizer::kAdagrad) return second + squares;
  const Floats share = Floats::broadcast(1.0f - step.beta2) * squares;
  if (kOptimizer == Optimizer::kYogi) return second - share.times_sign(second - squares);
  return fma(Floats::broadcast(step.beta2), second, share);
}

// Moments and parameters of count elements from e on, given their combined updates d.
template <Optimizer kOptimizer>
inline void apply_run(const StepArguments& step, const StepTarget& target, int64_t e, int64_t count,
                      const float* d, StepAccumulator* out) {
  for (int64_t k = 0; k < count; k += Floats::kLanes, e += Floats::kLanes) {
    const int64_t rest = count - k;
    const Floats combined = Floats::load(d + k);
    out->nonfinite += combined.count_nonfinite();
    Floats change = Floats::broadcast(step.gain) * combined;
    if (target.momentum != nullptr) {
      // With beta 0 the old momentum is not read: 0 * inf must not poison the step.
      if (step.beta != 0.0f) {
        change = fma(Floats::broadcast(step.beta), load_part(target.momentum + e, rest), change);
      }
      store_part(change, target.momentum + e, rest);
    }
    if (kOptimizer != Optimizer::kSgd) {
      const Floats second =
          next_second<kOptimizer>(load_part(target.second + e, rest), combined, step);
      store_part(second, target.second + e, rest);
      change = change / (second.sqrt() + Floats::broadcast(step.epsilon));
    }
    const Floats params = load_part(target.params + e, rest);
    store_part(fma(Floats::broadcast(step.lr), change, params), target.params + e, rest);
    change.add_squares(out->squares);
  }
}

inline void apply_run(const StepArguments& step, const StepTarget& target, int64_t e, int64_t count,
                      const float* d, StepAccumulator* out) {
  switch (step.optimizer) {
    case Optimizer::kSgd:
      return apply_run<Optimizer::kSgd>(step, target, e, count, d, out);
    case Optimizer::kAdam:
      return apply_run<Optimizer::kAdam>(step, target, e, count, d, out);
    case Optimizer::kYogi:
      return apply_run<Optimizer::kYogi>(step, target, e, count, d, out);
    case Optimizer::kAdagrad:
      return apply_run<Optimizer::kAdagrad>(step, target, e, count, d, out);
  }
}

inline void add_to(StepSums* sums, const StepAccumulator& out) {
  add_lanes_to(&sums->squares, out.squares);
  sums->nonfinite += out.nonfinite;
}

void server_step_block(const StepArguments& step, int segment, int64_t begin, int64_t end,
                       StepSums* sums) {
  const int n = step.updates.count;
  with_type(step.updates.pointer, step.updates.dtype, [&](const auto* rows) {
    alignas(64) float d[kStepRun];
    for (int64_t run = begin; run < end; run += kStepRun) {
      const int count = static_cast<int>(end - run < kStepRun ? end - run : kStepRun);
      for (int m = 0; m < step.num_targets; ++m) {
        const float* weights = step.weights + (int64_t{m} * step.segments.count + segment) * n;
        add_rows(rows, n, run, weights, count, d);
        StepAccumulator out;
        apply_run(step, step.targets[m], run, count, d, &out);
        add_to(&sums[m], out);
      }
    }
  });
}

void weighted_sum_block(const MeanTask& task, int64_t begin, int64_t end) {
  with_type(task.rows.pointer, task.rows.dtype, [&](const auto* rows) {
    alignas(64) float d[kStepRun];
    for (int64_t run = begin; run < end; run += kStepRun) {
      const int count = static_cast<int>(end - run < kStepRun ? end - run : kStepRun);
      if (task.rows.count > 0) {
        add_rows(rows, task.rows.count, run, task.weights, count, d);
      } else {
        __builtin_memset(d, 0, sizeof d);
      }
      __builtin_memcpy(task.out + run, d, sizeof(float) * count);
    }
  });
}
