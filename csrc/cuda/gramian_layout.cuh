// Which sums the Gram kernels form and where they put them.
//
// Rows are taken in blocks of 8. A launch forms tiles of 8 x 8 inner products between its blocks
// and writes them, one tile after the other, as partial sums [pieces, tiles, 8, 8]. The tiles of
// two neighbouring blocks of rows come in turns: (0, 0), (1, 0), (0, 1), (1, 1), ..., (2, 0), ...,
// leaving out what the launch does not form. One instruction can then make two of them.
#pragma once

#include "device.cuh"

namespace fedcmt {
namespace cuda {

constexpr int kTileSide = 8;
constexpr int kTileEntries = kTileSide * kTileSide;
constexpr int kMaxRowBlocks = 8;
constexpr int kMaxGramRows = kTileSide * kMaxRowBlocks;

// Tiles (i, j) between the row blocks of a launch.
enum class TileSet : int {
  kTriangle,    // i <= j: all pairs of rows
  kRectangle,   // i in the first half of the blocks, j in the second
  kLastColumn,  // j the last block
};

__host__ __device__ constexpr bool has_tile(TileSet set, int row_blocks, int i, int j) {
  if (i >= row_blocks) return false;
  return set == TileSet::kTriangle    ? i <= j
         : set == TileSet::kRectangle ? i < row_blocks / 2 && j >= row_blocks / 2
                                      : j == row_blocks - 1;
}

__host__ __device__ constexpr int count_tiles(TileSet set, int row_blocks) {
  int tiles = 0;
  for (int i = 0; i < row_blocks; ++i) {
    for (int j = 0; j < row_blocks; ++j) tiles += has_tile(set, row_blocks, i, j);
  }
  return tiles;
}

// By value, so that the pointers sit in constant memory and need no copy of their own. Places
// without a row of their own repeat another row: their sums are never looked at.
struct GramRows {
  const void* pointer[kMaxGramRows];
};

// The rows of a launch among all N: places [0, split) hold `first`, `first + 1`, ..., the places
// from `split` on hold `second`, `second + 1`, ...
struct Placement {
  int first, first_count;
  int second, second_count;
  int split;

  // Index of the row in a place, or -1.
  __host__ __device__ int row(int place) const {
    if (place < split) return place < first_count ? first + place : -1;
    return place - split < second_count ? second + place - split : -1;
  }
};

// What the finishing kernel has to know of a launch.
struct GramLayout {
  TileSet set;
  int row_blocks;
  Placement placement;
  int num_rows;        // N
  bool only_last_row;  // write [S, N] instead of [S, N, N]
};

}  // namespace cuda
}  // namespace fedcmt
