// Gram matrix of a block. See block_kernels_impl.h for who includes this and how.

// Calls body(i) for i = 0 ... kCount - 1, each a constant: GCC keeps arrays in registers only where
// it sees constant indices early.
template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};
template <int kCount, int kFirst = 0, typename Body>
inline __attribute__((always_inline)) void unrolled(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Constant<kFirst>{});
    unrolled<kCount, kFirst + 1>(body);
  }
}

// Rows of widened runs stand apart by more than a power of two, lest they compete for cache sets.
constexpr int kPitch = kMaxRun + kRunPadding;

// From memory, float32 widens to float64 in fewer steps than 16-bit types do, so these pass through a
// buffer of float32; so does the odd tail of a float32 row. Two vectors at a time, load_two may
// order the elements as it likes: the order is the same for all rows.
constexpr int kCopied = 2 * Floats::kLanes;
inline int pad(int count) { return (count + kCopied - 1) / kCopied * kCopied; }

template <typename T>
inline const float* copy_run(const T* row, int count, float* buffer) {
  int e = 0;
  for (; e + kCopied <= count; e += kCopied) load_two(row + e, buffer + e);
  if (e < count) {
    T part[kCopied] = {};
    for (int k = 0; e + k < count; ++k) part[k] = row[e + k];
    load_two(part, buffer + e);
  }
  return buffer;
}
template <typename T>
inline const float* float_run(const T* row, int count, float* buffer) {
  return copy_run(row, count, buffer);
}
inline const float* float_run(const float* row, int count, float* buffer) {
  return count % kCopied == 0 ? row : copy_run(row, count, buffer);
}

// Fetches elements [0, kChunk) of a row into the cache.
constexpr int kChunk = 64;
template <typename T>
inline void prefetch_chunk(const T* row) {
  constexpr int kLine = 64 / sizeof(T);
  for (int e = 0; e < kChunk; e += kLine) __builtin_prefetch(row + e);
}

// The tile on the diagonal: sums[i][j] (a vector each) += a[i] * a[j] over one run. The product of
// two float32 values is exact in float64, so the only rounding is that of the float64 sums. On the
// way it widens its rows for the other tiles and fetches their next runs, so that conversion, memory
// and arithmetic overlap.
template <int kRows, typename T>
inline void diagonal_tile(const T* const* rows, int64_t run, int count, double* a, double* sums) {
  alignas(64) float buffers[kRows][kMaxRun];
  const float* source[kRows];
  Doubles acc[kRows][kRows], x[kRows];
  unrolled<kRows>([&](auto i) {
    source[i] = float_run(rows[i] + run, count, buffers[i]);
    unrolled<kRows>([&](auto j) {
      acc[i][j] = Doubles::load(sums + (i * kRows + j) * Doubles::kLanes);
    });
  });
  const int padded = pad(count);
  for (int chunk = 0; chunk < padded; chunk += kChunk) {
    unrolled<kRows>([&](auto i) { prefetch_chunk(rows[i] + run + kMaxRun + chunk); });
    const int last = chunk + kChunk < padded ? chunk + kChunk : padded;
    for (int e = chunk; e < last; e += Doubles::kLanes) {
      unrolled<kRows>([&](auto i) {
        x[i] = Doubles::widen(source[i] + e);
        x[i].store(a + i * kPitch + e);
      });
      unrolled<kRows>([&](auto i) {
        unrolled<kRows>([&](auto j) {
          if constexpr (j >= i) acc[i][j] = fma(x[i], x[j], acc[i][j]);
        });
      });
    }
  }
  unrolled<kRows>([&](auto i) {
    unrolled<kRows>([&](auto j) {
      if constexpr (j >= i) acc[i][j].store(sums + (i * kRows + j) * Doubles::kLanes);
    });
  });
}

// A tile right of a diagonal tile always has all its rows, so only its columns vary.
template <int kColumns>
inline void off_diagonal_tile(const double* a, const double* b, int count, double* sums) {
  Doubles acc[kTile][kColumns];
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      acc[i][j] = Doubles::load(sums + (i * kColumns + j) * Doubles::kLanes);
    }
  }
  for (int e = 0; e < count; e += Doubles::kLanes) {
    Doubles x[kTile];
    for (int i = 0; i < kTile; ++i) x[i] = Doubles::load(a + i * kPitch + e);
    for (int j = 0; j < kColumns; ++j) {
      const Doubles y = Doubles::load(b + j * kPitch + e);
      for (int i = 0; i < kTile; ++i) acc[i][j] = fma(x[i], y, acc[i][j]);
    }
  }
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      acc[i][j].store(sums + (i * kColumns + j) * Doubles::kLanes);
    }
  }
}

template <int kRows = 1, typename T>
inline void diagonal_tile(int num_rows, const T* const* rows, int64_t run, int count, double* a,
                          double* sums) {
  if constexpr (kRows <= kTile) {
    if (num_rows == kRows) return diagonal_tile<kRows>(rows, run, count, a, sums);
    diagonal_tile<kRows + 1>(num_rows, rows, run, count, a, sums);
  }
}

template <int kColumns = 1>
inline void off_diagonal_tile(int num_columns, const double* a, const double* b, int count,
                              double* sums) {
  if constexpr (kColumns <= kTile) {
    if (num_columns == kColumns) return off_diagonal_tile<kColumns>(a, b, count, sums);
    off_diagonal_tile<kColumns + 1>(num_columns, a, b, count, sums);
  }
}

inline int tile_width(int n, int first) { return n - first < kTile ? n - first : kTile; }

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

// Tile of rows from i and columns from j on, both multiples of kTile, in the packed triangle.
inline int64_t tile_index(int n, int i, int j) {
  const int64_t side = (n + kTile - 1) / kTile, row = i / kTile, column = j / kTile;
  return row * side - row * (row - 1) / 2 + column - row;
}

// Tiles are taken by panels of rows, whose runs stay in the innermost cache while those of all later
// rows pass by.
constexpr int kPanel = 4 * kTile;

template <typename T>
inline void gramian_typed(const T* const* rows, int n, int64_t begin, int64_t end, double* scratch,
                          double* pairs) {
  constexpr int kTileDoubles = kTile * kTile * Doubles::kLanes;
  double* widened = scratch;                     // [n, kPitch]
  double* sums = scratch + int64_t{n} * kPitch;  // [tiles, kTile * kTile, lanes]
  const int64_t num_sums = (tile_index(n, n - 1, n - 1) + 1) * kTileDoubles;
  for (int64_t k = 0; k < num_sums; ++k) sums[k] = 0.0;

  for (int64_t run = begin; run < end; run += kMaxRun) {
    const int count = static_cast<int>(end - run < kMaxRun ? end - run : kMaxRun);
    for (int i = 0; i < n; i += kTile) {
      diagonal_tile(tile_width(n, i), rows + i, run, count, widened + int64_t{i} * kPitch,
                    sums + tile_index(n, i, i) * kTileDoubles);
    }
    for (int first = 0; first < n; first += kPanel) {
      for (int j = first + kTile; j < n; j += kTile) {
        const double* b = widened + int64_t{j} * kPitch;
        for (int i = first; i < j && i < first + kPanel; i += kTile) {
          off_diagonal_tile(tile_width(n, j), widened + int64_t{i} * kPitch, b, pad(count),
                            sums + tile_index(n, i, j) * kTileDoubles);
        }
      }
    }
  }
  collect_tiles(n, sums, pairs);
}

// Lanes and order of additions are those of gramian_typed, so the sums are the same bits.
template <int kRows, typename T>
inline void multiply_with_last(const T* const* rows, int64_t run, int count, const double* last,
                               double* sums) {
  alignas(64) float buffers[kRows][kMaxRun];
  const float* source[kRows];
  Doubles acc[kRows];
  unrolled<kRows>([&](auto i) {
    source[i] = float_run(rows[i] + run, count, buffers[i]);
    acc[i] = Doubles::load(sums + i * Doubles::kLanes);
  });
  const int padded = pad(count);
  for (int chunk = 0; chunk < padded; chunk += kChunk) {
    unrolled<kRows>([&](auto i) { prefetch_chunk(rows[i] + run + kMaxRun + chunk); });
    for (int e = chunk; e < chunk + kChunk && e < padded; e += Doubles::kLanes) {
      const Doubles y = Doubles::load(last + e);
      unrolled<kRows>([&](auto i) { acc[i] = fma(Doubles::widen(source[i] + e), y, acc[i]); });
    }
  }
  unrolled<kRows>([&](auto i) { acc[i].store(sums + i * Doubles::kLanes); });
}

template <int kRows = 1, typename T>
inline void multiply_group(int num_rows, const T* const* rows, int64_t run, int count,
                           const double* last, double* sums) {
  if constexpr (kRows <= kMaxTile) {
    if (num_rows == kRows) return multiply_with_last<kRows>(rows, run, count, last, sums);
    multiply_group<kRows + 1>(num_rows, rows, run, count, last, sums);
  }
}

template <typename T>
inline void gramian_row_typed(const T* const* rows, int n, int64_t begin, int64_t end,
                              double* scratch, double* products) {
  double* last = scratch;            // [kMaxRun]
  double* sums = scratch + kMaxRun;  // [n, lanes]
  alignas(64) float buffer[kMaxRun];
  for (int64_t k = 0; k < int64_t{n} * Doubles::kLanes; ++k) sums[k] = 0.0;
  for (int64_t run = begin; run < end; run += kMaxRun) {
    const int count = static_cast<int>(end - run < kMaxRun ? end - run : kMaxRun);
    const float* source = float_run(rows[n - 1] + run, count, buffer);
    for (int e = 0; e < pad(count); e += Doubles::kLanes) Doubles::widen(source + e).store(last + e);
    for (int i = 0; i < n; i += kMaxTile) {
      multiply_group(n - i < kMaxTile ? n - i : kMaxTile, rows + i, run, count, last,
                     sums + int64_t{i} * Doubles::kLanes);
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
