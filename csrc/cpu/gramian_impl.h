// Gram matrix of a block. See block_kernels_impl.h for who includes this and how.

// Widens count <= kMaxRun elements to float64 and pads with zeros to whole vectors. From memory,
// float32 widens in one instruction; 16-bit types go through a buffer of float32 to have that too.
inline void widen_run(const float* row, int count, double* out) {
  int e = 0;
  for (; e + Doubles::kLanes <= count; e += Doubles::kLanes) {
    Doubles::widen(row + e).store(out + e);
  }
  if (e < count) {
    float tail[Doubles::kLanes] = {};
    for (int k = 0; e + k < count; ++k) tail[k] = row[e + k];
    Doubles::widen(tail).store(out + e);
  }
}

template <typename T>
inline void widen_run(const T* row, int count, double* out) {
  alignas(64) float buffer[kMaxRun];
  int e = 0;
  for (; e + Floats::kLanes <= count; e += Floats::kLanes) Floats::load(row + e).store(buffer + e);
  if (e < count) load_part(row + e, count - e).store(buffer + e);
  widen_run(buffer, count, out);
}

// Fetches the next run of a row into the cache, a line at a time, while a tile is multiplied.
template <typename T>
inline void prefetch_line(const T* next, int e) {
  constexpr int kLine = 64 / sizeof(T);
  if (e % kLine == 0) __builtin_prefetch(next + e);
}

// sums[i][j] (a vector each) += a[i] * b[j] over one run. The product of two float32 values is
// exact in float64, so the only rounding is that of the float64 sums. Meanwhile the diagonal tiles,
// of which every row has one, fetch the next run of their rows: memory and arithmetic overlap.
template <int kRows, int kColumns, bool kDiagonal, typename T>
inline void multiply_tile(const double* a, const double* b, int pitch, int count,
                          const T* const* next, double* sums) {
  Doubles acc[kRows][kColumns];
  for (int i = 0; i < kRows; ++i) {
    for (int j = kDiagonal ? i : 0; j < kColumns; ++j) {
      acc[i][j] = Doubles::load(sums + (i * kColumns + j) * Doubles::kLanes);
    }
  }
  for (int e = 0; e < count; e += Doubles::kLanes) {
    Doubles x[kRows];
    for (int i = 0; i < kRows; ++i) {
      if (kDiagonal) prefetch_line(next[i], e);
      x[i] = Doubles::load(a + i * pitch + e);
    }
    for (int j = 0; j < kColumns; ++j) {
      const Doubles y = kDiagonal ? x[j % kRows] : Doubles::load(b + j * pitch + e);
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
inline void diagonal_tile(int rows, const double* a, int pitch, int count, const T* const* next,
                          double* sums) {
  switch (rows) {
    case 1:
      return multiply_tile<1, 1, true>(a, a, pitch, count, next, sums);
    case 2:
      return multiply_tile<2, 2, true>(a, a, pitch, count, next, sums);
    case 3:
      return multiply_tile<3, 3, true>(a, a, pitch, count, next, sums);
    default:
      return multiply_tile<kTile, kTile, true>(a, a, pitch, count, next, sums);
  }
}

// A tile right of a diagonal tile always has all its rows, so only its columns vary.
inline void off_diagonal_tile(int columns, const double* a, const double* b, int pitch, int count,
                              double* sums) {
  constexpr const float* const* kNothing = nullptr;
  switch (columns) {
    case 1:
      return multiply_tile<kTile, 1, false>(a, b, pitch, count, kNothing, sums);
    case 2:
      return multiply_tile<kTile, 2, false>(a, b, pitch, count, kNothing, sums);
    case 3:
      return multiply_tile<kTile, 3, false>(a, b, pitch, count, kNothing, sums);
    default:
      return multiply_tile<kTile, kTile, false>(a, b, pitch, count, kNothing, sums);
  }
}

inline int tile_width(int n, int first) { return n - first < kTile ? n - first : kTile; }

inline double add_lanes(const double* lanes) {
  double total = 0.0;
  for (int k = 0; k < Doubles::kLanes; ++k) total += lanes[k];
  return total;
}

// Adds the lanes of every tile to pairs [n, n], always in the same order.
inline void collect_tiles(int n, const double* sums, double* pairs) {
  for (int i = 0; i < n; i += kTile) {
    for (int j = i; j < n; j += kTile, sums += kTile * kTile * Doubles::kLanes) {
      const int rows = tile_width(n, i), columns = tile_width(n, j);
      for (int r = 0; r < rows; ++r) {
        for (int c = i == j ? r : 0; c < columns; ++c) {
          pairs[(i + r) * int64_t{n} + j + c] +=
              add_lanes(sums + (r * columns + c) * Doubles::kLanes);
        }
      }
    }
  }
}

template <typename T>
inline void gramian_typed(const T* const* rows, int n, int64_t begin, int64_t end, double* scratch,
                          double* pairs) {
  constexpr int kTileDoubles = kTile * kTile * Doubles::kLanes;
  double* widened = scratch;                      // [n, kMaxRun]
  double* sums = scratch + int64_t{n} * kMaxRun;  // [tiles, kTile * kTile, lanes]
  const int64_t tiles = (n + kTile - 1) / kTile;
  const int64_t num_sums = tiles * (tiles + 1) / 2 * kTileDoubles;
  for (int64_t k = 0; k < num_sums; ++k) sums[k] = 0.0;

  for (int64_t run = begin; run < end; run += kMaxRun) {
    const int count = static_cast<int>(end - run < kMaxRun ? end - run : kMaxRun);
    for (int i = 0; i < n; ++i) widen_run(rows[i] + run, count, widened + int64_t{i} * kMaxRun);
    double* tile = sums;
    for (int i = 0; i < n; i += kTile) {
      const double* a = widened + int64_t{i} * kMaxRun;
      const T* next[kTile];
      for (int k = 0; k < tile_width(n, i); ++k) next[k] = rows[i + k] + run + kMaxRun;
      diagonal_tile(tile_width(n, i), a, kMaxRun, count, next, tile);
      tile += kTileDoubles;
      for (int j = i + kTile; j < n; j += kTile, tile += kTileDoubles) {
        off_diagonal_tile(tile_width(n, j), a, widened + int64_t{j} * kMaxRun, kMaxRun, count,
                          tile);
      }
    }
  }
  collect_tiles(n, sums, pairs);
}

// Lanes and order of additions are those of gramian_typed, so the sums are the same bits.
template <int kRows, typename T>
inline void multiply_with_last(const T* const* rows, int64_t offset, const double* last, int count,
                               double* sums) {
  Doubles acc[kRows];
  for (int i = 0; i < kRows; ++i) acc[i] = Doubles::load(sums + i * Doubles::kLanes);
  int e = 0;
  for (; e + Doubles::kLanes <= count; e += Doubles::kLanes) {
    const Doubles y = Doubles::load(last + e);
    for (int i = 0; i < kRows; ++i) {
      acc[i] = fma(Doubles::widen(rows[i] + offset + e), y, acc[i]);
    }
  }
  if (e < count) {
    const Doubles y = Doubles::load(last + e);
    for (int i = 0; i < kRows; ++i) {
      T tail[Doubles::kLanes] = {};
      for (int k = 0; e + k < count; ++k) tail[k] = rows[i][offset + e + k];
      acc[i] = fma(Doubles::widen(tail), y, acc[i]);
    }
  }
  for (int i = 0; i < kRows; ++i) acc[i].store(sums + i * Doubles::kLanes);
}

template <typename T>
inline void gramian_row_typed(const T* const* rows, int n, int64_t begin, int64_t end,
                              double* scratch, double* products) {
  double* last = scratch;            // [kMaxRun]
  double* sums = scratch + kMaxRun;  // [n, lanes]
  for (int64_t k = 0; k < int64_t{n} * Doubles::kLanes; ++k) sums[k] = 0.0;
  for (int64_t run = begin; run < end; run += kMaxRun) {
    const int count = static_cast<int>(end - run < kMaxRun ? end - run : kMaxRun);
    widen_run(rows[n - 1] + run, count, last);
    for (int i = 0; i < n; i += 4) {
      double* into = sums + int64_t{i} * Doubles::kLanes;
      switch (n - i) {
        case 1:
          multiply_with_last<1>(rows + i, run, last, count, into);
          break;
        case 2:
          multiply_with_last<2>(rows + i, run, last, count, into);
          break;
        case 3:
          multiply_with_last<3>(rows + i, run, last, count, into);
          break;
        default:
          multiply_with_last<4>(rows + i, run, last, count, into);
      }
    }
  }
  for (int i = 0; i < n; ++i) products[i] += add_lanes(sums + int64_t{i} * Doubles::kLanes);
}

// Calls work with the rows as pointers to values of their type.
template <typename Work>
inline void with_type(const void* const* rows, Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::kFloat32:
      return work(reinterpret_cast<const float* const*>(rows));
    case Dtype::kBFloat16:
      return work(reinterpret_cast<const BFloat16* const*>(rows));
    case Dtype::kFloat16:
      return work(reinterpret_cast<const Float16* const*>(rows));
  }
}

void gramian_block(const void* const* rows, int n, Dtype dtype, int64_t begin, int64_t end,
                   double* scratch, double* pairs) {
  with_type(rows, dtype,
            [&](const auto* typed) { gramian_typed(typed, n, begin, end, scratch, pairs); });
}

void gramian_row_block(const void* const* rows, int n, Dtype dtype, int64_t begin, int64_t end,
                       double* scratch, double* products) {
  with_type(rows, dtype,
            [&](const auto* typed) { gramian_row_typed(typed, n, begin, end, scratch, products); });
}
