// The kernels of `gramian` and `gramian_row`.
//
// Products and sums are float64; a product of two float32 values is then exact. Up to 4 rows keep
// one sum for every pair in the registers of each thread. More rows go through the float64 tensor
// cores: a warp holds its tiles of 8 x 8 sums in registers and reads the rows straight into the
// layout that the instruction wants, which is the same for both factors of a Gram matrix.
//
// A sum depends, to the last bit, on its two rows, the length and the bounds only: elements go to
// warps, lanes and places in the chain of additions in the same way for every number of rows above
// 4, and again for every number up to 4.
#pragma once

#include "gramian_layout.cuh"
#include "multiply_tile.cuh"
#include "pieces.cuh"
#include "reduce.cuh"

namespace fedcmt {
namespace cuda {

constexpr int kMaxRegisterRows = 4;
constexpr int kFinishThreads = 1024;

// Packets of each row that a lane takes in a step, and how many of them are loaded at once.
constexpr int kTilePackets = 4;
constexpr int packets_in_flight(int row_blocks) {
  return row_blocks <= 2 ? 4 : row_blocks == 3 ? 2 : 1;
}

// Blocks of threads that should fit on a multiprocessor: two where the sums leave room for them.
constexpr int resident_blocks(TileSet set, int row_blocks) {
  return set == TileSet::kTriangle && row_blocks <= 5 ? 2 : 1;
}

template <typename T, int kRowBlocks, TileSet kSet>
struct TileSums {
  static constexpr int kSize = Packet<T>::kSize;
  static constexpr int kTiles = count_tiles(kSet, kRowBlocks);
  static constexpr int kInFlight = packets_in_flight(kRowBlocks);
  static constexpr int kStep = kTilePackets * 4 * kSize;  // elements of a row a warp takes at once

  double sums[kTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) sums[t][0] = sums[t][1] = 0.0;
  }

  // Four elements of every row, one in each lane of its group of four.
  __device__ __forceinline__ void add_elements(const double (&x)[kRowBlocks]) {
    int tile = 0;
#pragma unroll
    for (int i = 0; i < kRowBlocks; i += 2) {
#pragma unroll
      for (int j = 0; j < kRowBlocks; ++j) {
        const bool one = has_tile(kSet, kRowBlocks, i, j);
        const bool next = has_tile(kSet, kRowBlocks, i + 1, j);
        if (one && next) {
          multiply_two_tiles(x[i], x[i + 1], x[j], sums[tile], sums[tile + 1]);
        } else if (one || next) {
          multiply_tile(x[one ? i : i + 1], x[j], sums[tile]);
        }
        tile += one + next;
      }
    }
  }

  // rows: [kRowBlocks], the row of this lane in every block; start: of the step.
  template <bool kWide>
  __device__ __forceinline__ void add_step(const T* const (&rows)[kRowBlocks], int64_t start,
                                           const Range& range) {
    const int64_t mine = start + threadIdx.x % 4 * kSize;
#pragma unroll 1
    for (int u = 0; u < kTilePackets; u += kInFlight) {
      Packet<T> packets[kInFlight][kRowBlocks];
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
          packets[v][b] = load_row<kWide>(rows[b], mine + (u + v) * 4 * kSize, range);
        }
      }
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          double x[kRowBlocks];
#pragma unroll
          for (int b = 0; b < kRowBlocks; ++b) x[b] = to_float(packets[v][b].value[k]);
          add_elements(x);
        }
      }
    }
  }

  // The warps of the block, one after the other. totals: shared memory [kTiles * kTileEntries].
  __device__ __forceinline__ void add_warps(double* totals) const {
    for (int k = threadIdx.x; k < kTiles * kTileEntries; k += kThreads) totals[k] = 0.0;
    double* mine = totals + threadIdx.x % 32 * 2;
#pragma unroll 1
    for (int turn = 0; turn < kWarps; ++turn) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) / 32 != turn) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mine[t * kTileEntries] += sums[t][0];
        mine[t * kTileEntries + 1] += sums[t][1];
      }
    }
    __syncthreads();
  }
};

template <typename T, int kRowBlocks, TileSet kSet>
__global__ void __launch_bounds__(kThreads, resident_blocks(kSet, kRowBlocks))
    gramian_tiles(GramRows rows, PieceSource pieces, bool aligned, double* __restrict__ partials) {
  using Sums = TileSums<T, kRowBlocks, kSet>;
  constexpr int kEntries = Sums::kTiles * kTileEntries;
  const T* mine[kRowBlocks];
#pragma unroll
  for (int b = 0; b < kRowBlocks; ++b) {
    mine[b] = static_cast<const T*>(rows.pointer[b * kTileSide + threadIdx.x % 32 / 4]);
  }
  const Range range = find_piece(pieces, blockIdx.x).range;
  const Steps<Sums::kStep> steps(range);
  Sums sums;
  sums.clear();
  int64_t step = threadIdx.x / 32;
  if (aligned) {
    for (; step < steps.whole; step += kWarps) {
      sums.template add_step<true>(mine, steps.start(step), range);
    }
  }
  for (; step < steps.count(); step += kWarps) {
    sums.template add_step<false>(mine, steps.start(step), range);
  }
  FEDCMT_SHARED(double, totals, [kEntries]);
  sums.add_warps(totals);
  double* out = partials + static_cast<int64_t>(blockIdx.x) * kEntries;
  for (int k = threadIdx.x; k < kEntries; k += kThreads) out[k] = totals[k];
}

// For up to 4 rows: every lane has elements of its own, and one sum for every pair of rows.
template <typename T, int kRows>
struct PairSums {
  static constexpr int kSize = Packet<T>::kSize;
  static constexpr int kPairs = kRows * (kRows + 1) / 2;
  static constexpr int kStep = 512;  // elements of a row that a warp takes at once
  static constexpr int kPackets = kStep / (32 * kSize);
  static constexpr int kInFlight = kRows <= 2 ? kPackets : kPackets / 2;

  double sums[kPairs];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) sums[p] = 0.0;
  }

  __device__ __forceinline__ void add_element(const double (&x)[kRows]) {
#pragma unroll
    for (int i = 0, p = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = i; j < kRows; ++j, ++p) sums[p] = fma(x[i], x[j], sums[p]);
    }
  }

  template <bool kWide>
  __device__ __forceinline__ void add_step(const GramRows& rows, int64_t start,
                                           const Range& range) {
    const int64_t mine = start + threadIdx.x % 32 * kSize;
#pragma unroll
    for (int u = 0; u < kPackets; u += kInFlight) {
      Packet<T> packets[kInFlight][kRows];
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          packets[v][i] = load_row<kWide>(static_cast<const T*>(rows.pointer[i]),
                                          mine + (u + v) * 32 * kSize, range);
        }
      }
#pragma unroll
      for (int v = 0; v < kInFlight; ++v) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          double x[kRows];
#pragma unroll
          for (int i = 0; i < kRows; ++i) x[i] = to_float(packets[v][i].value[k]);
          add_element(x);
        }
      }
    }
  }
};

// Writes one tile, of which the pairs of the kRows rows are filled.
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads)
    gramian_pairs(GramRows rows, PieceSource pieces, bool aligned, double* __restrict__ partials) {
  using Sums = PairSums<T, kRows>;
  const Range range = find_piece(pieces, blockIdx.x).range;
  const Steps<Sums::kStep> steps(range);
  Sums sums;
  sums.clear();
  int64_t step = threadIdx.x / 32;
  if (aligned) {
    for (; step < steps.whole; step += kWarps) {
      sums.template add_step<true>(rows, steps.start(step), range);
    }
  }
  for (; step < steps.count(); step += kWarps) {
    sums.template add_step<false>(rows, steps.start(step), range);
  }
  FEDCMT_SHARED(double, warp_sums, [Sums::kPairs][kWarps]);
  double* out = partials + static_cast<int64_t>(blockIdx.x) * kTileEntries;
#pragma unroll
  for (int i = 0, p = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = i; j < kRows; ++j, ++p) {
      const double total = block_total(sums.sums[p], warp_sums[p]);
      if (threadIdx.x == 0) out[i * kTileSide + j] = total;
    }
  }
}

// Rows of the two factors of an entry of the partial sums; -1 where it is not part of the result.
struct GramEntry {
  int row, column;
};

__device__ __forceinline__ GramEntry find_entry(const GramLayout& layout, int index) {
  const int n = layout.row_blocks;
  int tile = index / kTileEntries, i = 0, j = 0;
  for (int k = 0; k < (n + 1) * n; ++k) {
    i = k / (2 * n) * 2 + k % 2;
    j = k / 2 % n;
    if (has_tile(layout.set, n, i, j) && tile-- == 0) break;
  }
  const int entry = index % kTileEntries;
  const int row_place = i * kTileSide + entry / kTileSide;
  const int column_place = j * kTileSide + entry % kTileSide;
  const int row = layout.placement.row(row_place), column = layout.placement.row(column_place);
  const bool used = row_place <= column_place && row >= 0 && column >= 0 &&
                    (!layout.only_last_row || column == layout.num_rows - 1);
  return used ? GramEntry{row, column} : GramEntry{-1, -1};
}

// Adds the pieces of segment blockIdx.x for 32 entries, one in each lane; each warp takes every
// 32nd piece. first_piece: [S + 1], or nullptr where all pieces belong to one segment.
__global__ void __launch_bounds__(kFinishThreads)
    gramian_finish(const double* __restrict__ partials, const int64_t* __restrict__ first_piece,
                   int64_t num_pieces, GramLayout layout, double* __restrict__ out) {
  constexpr int kSlices = kFinishThreads / 32;
  FEDCMT_SHARED(double, slices, [kSlices][32]);
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t segment = blockIdx.x;
  const int64_t first = first_piece == nullptr ? 0 : first_piece[segment];
  const int64_t end = first_piece == nullptr ? num_pieces : first_piece[segment + 1];
  const int64_t entries = static_cast<int64_t>(gridDim.y) * 32;
  const int index = blockIdx.y * 32 + lane;
  const GramEntry entry = find_entry(layout, index);
  double sum = 0.0;
  if (entry.row >= 0) {
#pragma unroll 8
    for (int64_t p = first + slice; p < end; p += kSlices) sum += partials[p * entries + index];
  }
  slices[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || entry.row < 0) return;
  for (int k = 1; k < kSlices; ++k) sum += slices[k][lane];
  const int64_t n = layout.num_rows;
  if (layout.only_last_row) {
    out[segment * n + entry.row] = sum;
  } else {
    out[(segment * n + entry.row) * n + entry.column] = sum;
    out[(segment * n + entry.column) * n + entry.row] = sum;
  }
}

}  // namespace cuda
}  // namespace fedcmt
