// The block kernels, written once over the vector types of a path.
//
// Included by plain.cpp, avx2.cpp and avx512.cpp inside an anonymous namespace, after they define
//   Doubles, Floats        vectors of Doubles::kLanes float64 and Floats::kLanes float32
//   kTile                  rows and columns of the Gramian's register tile
// It must include no header: see block_kernels.h.

// Widens count <= kRun elements to float64 and pads with zeros to whole vectors.
template <typename T>
inline void widen_run(const T* row, int count, double* out) {
  int e = 0;
  for (; e + Doubles::kLanes <= count; e += Doubles::kLanes) {
    Doubles::widen(row + e).store(out + e);
  }
  if (e < count) {
    T tail[Doubles::kLanes] = {};
    for (int k = 0; e + k < count; ++k) tail[k] = row[e + k];
    Doubles::widen(tail).store(out + e);
  }
}

// sums[i][j] (a vector each) += a[i] * b[j] over one run. The product of two float32 values is
// exact in float64, so the only rounding is that of the float64 sums. Meanwhile the diagonal tiles,
// of which every row has one, fetch the next run of their rows: memory and arithmetic overlap.
template <int kRows, int kColumns, bool kDiagonal, typename T>
inline void multiply_tile(const double* a, const double* b, int count, const T* const* next,
                          double* sums) {
  Doubles acc[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = kDiagonal ? i : 0; j < kColumns; ++j) {
      acc[i][j] = Doubles::load(sums + (i * kColumns + j) * Doubles::kLanes);
    }
  }
  for (int e = 0; e < count; e += Doubles::kLanes) {
    Doubles x[kRows];
    for (int i = 0; i < kRows; ++i) {
      if (kDiagonal) __builtin_prefetch(next[i] + e);
      x[i] = Doubles::load(a + i * kRun + e);
    }
    for (int j = 0; j < kColumns; ++j) {
      const Doubles y = kDiagonal ? x[j % kRows] : Doubles::load(b + j * kRun + e);
      for (int i = 0; i < (kDiagonal ? j + 1 : kRows); ++i) acc[i][j] = fma(x[i], y, acc[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = kDiagonal ? i : 0; j < kColumns; ++j) {
      acc[i][j].store(sums + (i * kColumns + j) * Doubles::kLanes);
    }
  }
}

template <typename T>
inline void diagonal_tile(int rows, const double* a, int count, const T* const* next,
                          double* sums) {
  switch (rows) {
    case 1:
      return multiply_tile<1, 1, true>(a, a, count, next, sums);
    case 2:
      return multiply_tile<2, 2, true>(a, a, count, next, sums);
    case 3:
      return multiply_tile<3, 3, true>(a, a, count, next, sums);
    default:
      return multiply_tile<kTile, kTile, true>(a, a, count, next, sums);
  }
}

// A tile right of a diagonal tile always has all its rows, so only its columns vary.
inline void off_diagonal_tile(int columns, const double* a, const double* b, int count,
                              double* sums) {
  constexpr const float* const* kNothing = nullptr;
  switch (columns) {
    case 1:
      return multiply_tile<kTile, 1, false>(a, b, count, kNothing, sums);
    case 2:
      return multiply_tile<kTile, 2, false>(a, b, count, kNothing, sums);
    case 3:
      return multiply_tile<kTile, 3, false>(a, b, count, kNothing, sums);
    default:
      return multiply_tile<kTile, kTile, false>(a, b, count, kNothing, sums);
  }
}

inline int tile_width(int n, int first) { return n - first < kTile ? n - first : kTile; }

// Adds the lanes of every tile to pairs [n, n], always in the same order.
inline void collect_tiles(int n, const double* sums, double* pairs) {
  constexpr int kLanes = Doubles::kLanes;
  for (int i = 0; i < n; i += kTile) {
    for (int j = i; j < n; j += kTile, sums += kTile * kTile * kLanes) {
      const int rows = tile_width(n, i), columns = tile_width(n, j);
      for (int r = 0; r < rows; ++r) {
        for (int c = i == j ? r : 0; c < columns; ++c) {
          const double* lanes = sums + (r * columns + c) * kLanes;
          double total = 0.0;
          for (int k = 0; k < kLanes; ++k) total += lanes[k];
          pairs[(i + r) * int64_t{n} + j + c] += total;
        }
      }
    }
  }
}

template <typename T>
inline void gramian_typed(const T* const* rows, int n, int64_t begin, int64_t end, double* scratch,
                          double* pairs) {
  constexpr int kTileDoubles = kTile * kTile * Doubles::kLanes;
  double* widened = scratch;                   // [n, kRun]
  double* sums = scratch + int64_t{n} * kRun;  // [tiles, kTile * kTile, lanes]
  const int64_t tiles = (n + kTile - 1) / kTile;
  const int64_t num_sums = tiles * (tiles + 1) / 2 * kTileDoubles;
  for (int64_t k = 0; k < num_sums; ++k) sums[k] = 0.0;

  for (int64_t run = begin; run < end; run += kRun) {
    const int count = static_cast<int>(end - run < kRun ? end - run : kRun);
    for (int i = 0; i < n; ++i) widen_run(rows[i] + run, count, widened + int64_t{i} * kRun);
    double* tile = sums;
    for (int i = 0; i < n; i += kTile) {
      const double* a = widened + int64_t{i} * kRun;
      const T* next[kTile];
      for (int k = 0; k < tile_width(n, i); ++k) next[k] = rows[i + k] + run + kRun;
      diagonal_tile(tile_width(n, i), a, count, next, tile);
      tile += kTileDoubles;
      for (int j = i + kTile; j < n; j += kTile, tile += kTileDoubles) {
        off_diagonal_tile(tile_width(n, j), a, widened + int64_t{j} * kRun, count, tile);
      }
    }
  }
  collect_tiles(n, sums, pairs);
}

void gramian_block(const void* const* rows, int n, Dtype dtype, int64_t begin, int64_t end,
                   double* scratch, double* pairs) {
  switch (dtype) {
    case Dtype::kFloat32:
      return gramian_typed(reinterpret_cast<const float* const*>(rows), n, begin, end, scratch,
                           pairs);
    case Dtype::kBFloat16:
      return gramian_typed(reinterpret_cast<const BFloat16* const*>(rows), n, begin, end, scratch,
                           pairs);
    case Dtype::kFloat16:
      return gramian_typed(reinterpret_cast<const Float16* const*>(rows), n, begin, end, scratch,
                           pairs);
  }
}

struct StepAccumulator {
  Doubles squares[2] = {Doubles::zero(), Doubles::zero()};
  int64_t nonfinite = 0;
};

// Momentum and parameters of one vector at element e, given its combined update d.
// With kTail the vector ends outside the arrays and only its first count elements are touched.
template <bool kTail>
inline void apply_update(const StepArguments& step, int64_t e, int count, Floats d,
                         StepAccumulator* out) {
  float buffer[Floats::kLanes];
  const auto load = [&](const float* from) {
    if (!kTail) return Floats::load(from);
    for (int k = 0; k < Floats::kLanes; ++k) buffer[k] = k < count ? from[k] : 0.0f;
    return Floats::load(buffer);
  };
  const auto store = [&](Floats value, float* to) {
    if (!kTail) return value.store(to);
    value.store(buffer);
    for (int k = 0; k < count; ++k) to[k] = buffer[k];
  };
  out->nonfinite += d.count_nonfinite();
  Floats m = d;
  if (step.momentum != nullptr) {
    // With beta 0 the old momentum is not read: 0 * inf must not poison the step.
    if (step.beta != 0.0f) m = fma(Floats::broadcast(step.beta), load(step.momentum + e), d);
    store(m, step.momentum + e);
  }
  store(fma(Floats::broadcast(step.lr), m, load(step.params + e)), step.params + e);
  m.add_squares(out->squares);
}

template <typename T>
inline void server_step_typed(const StepArguments& step, int64_t begin, int64_t end,
                              StepSums* sums) {
  constexpr int kLanes = Floats::kLanes;
  constexpr int kVectors = 4;  // independent sums in flight, and whole cache lines of each row
  const auto rows = reinterpret_cast<const T* const*>(step.updates);
  StepAccumulator out;
  int64_t e = begin;
  for (; e + kVectors * kLanes <= end; e += kVectors * kLanes) {
    Floats d[kVectors];
    for (int v = 0; v < kVectors; ++v) d[v] = Floats::broadcast(0.0f);
    for (int i = 0; i < step.num_updates; ++i) {
      const Floats weight = Floats::broadcast(step.weights[i]);
      for (int v = 0; v < kVectors; ++v) {
        d[v] = fma(weight, Floats::load(rows[i] + e + v * kLanes), d[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      apply_update<false>(step, e + v * kLanes, kLanes, d[v], &out);
    }
  }
  for (; e < end; e += kLanes) {
    const int count = static_cast<int>(end - e < kLanes ? end - e : kLanes);
    Floats d = Floats::broadcast(0.0f);
    for (int i = 0; i < step.num_updates; ++i) {
      T tail[kLanes] = {};
      for (int k = 0; k < count; ++k) tail[k] = rows[i][e + k];
      d = fma(Floats::broadcast(step.weights[i]), Floats::load(tail), d);
    }
    apply_update<true>(step, e, count, d, &out);
  }
  double lanes[2][Doubles::kLanes];
  for (int v = 0; v < 2; ++v) {
    out.squares[v].store(lanes[v]);
    for (int k = 0; k < Doubles::kLanes; ++k) sums->momentum_squares += lanes[v][k];
  }
  sums->nonfinite += out.nonfinite;
}

void server_step_block(const StepArguments& step, int64_t begin, int64_t end, StepSums* sums) {
  switch (step.dtype) {
    case Dtype::kFloat32:
      return server_step_typed<float>(step, begin, end, sums);
    case Dtype::kBFloat16:
      return server_step_typed<BFloat16>(step, begin, end, sums);
    case Dtype::kFloat16:
      return server_step_typed<Float16>(step, begin, end, sums);
  }
}
