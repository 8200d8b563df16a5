// Gram matrices and their last rows: which kernels run on which rows.
//
// Up to 64 rows take one pass. More rows are cut into panels of 32: one launch for two neighbouring
// panels and all pairs of their rows, then one for every other pair of panels. Partial sums of the
// pieces go to the workspace and a second kernel adds them in a fixed order: no atomics.
#include <algorithm>

#include "gramian_kernels.cuh"
#include "tables.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kPanel = kMaxGramRows / 2;

// Everything that the launches of one call have in common.
struct GramCall {
  Rows updates;
  bool aligned;
  PieceSource pieces;
  int64_t num_pieces;
  const int64_t* first_piece;
  int num_segments;
  double* partials;
  double* out;
  cudaStream_t stream;
};

GramRows place_rows(const Rows& updates, const Placement& placement) {
  GramRows rows;
  for (int place = 0; place < kMaxGramRows; ++place) {
    const int row = placement.row(place);
    const bool after_split = place >= placement.split && placement.second_count > 0;
    rows.pointer[place] = updates.pointer[row >= 0      ? row
                                          : after_split ? placement.second
                                                        : placement.first];
  }
  return rows;
}

template <typename T, int kRowBlocks, TileSet kSet>
void run_tiles(const GramCall& call, const GramRows& rows) {
  FEDCMT_RUN((gramian_tiles<T, kRowBlocks, kSet>), static_cast<unsigned>(call.num_pieces), kThreads,
             call.stream, rows, call.pieces, call.aligned, call.partials);
}

template <typename T, int kRows = 1>
void run_pairs(const GramCall& call, const GramRows& rows, int num_rows) {
  if constexpr (kRows <= kMaxRegisterRows) {
    if (num_rows != kRows) return run_pairs<T, kRows + 1>(call, rows, num_rows);
    FEDCMT_RUN((gramian_pairs<T, kRows>), static_cast<unsigned>(call.num_pieces), kThreads,
               call.stream, rows, call.pieces, call.aligned, call.partials);
  }
}

template <typename T, int kRowBlocks = 1>
void run_triangle(const GramCall& call, const GramRows& rows, int row_blocks) {
  if constexpr (kRowBlocks <= kMaxRowBlocks) {
    if (row_blocks != kRowBlocks) {
      return run_triangle<T, kRowBlocks + 1>(call, rows, row_blocks);
    }
    run_tiles<T, kRowBlocks, TileSet::kTriangle>(call, rows);
  }
}

template <typename T>
void run_last_column(const GramCall& call, const GramRows& rows, int row_blocks) {
  switch (row_blocks) {
    case 2:
      return run_tiles<T, 2, TileSet::kLastColumn>(call, rows);
    case 4:
      return run_tiles<T, 4, TileSet::kLastColumn>(call, rows);
    default:
      return run_tiles<T, 8, TileSet::kLastColumn>(call, rows);
  }
}

template <typename T>
void run_pieces(const GramCall& call, const GramLayout& layout) {
  const GramRows rows = place_rows(call.updates, layout.placement);
  if (call.updates.count <= kMaxRegisterRows) {
    run_pairs<T>(call, rows, call.updates.count);
  } else if (layout.set == TileSet::kTriangle) {
    run_triangle<T>(call, rows, layout.row_blocks);
  } else if (layout.set == TileSet::kRectangle) {
    run_tiles<T, kMaxRowBlocks, TileSet::kRectangle>(call, rows);
  } else {
    run_last_column<T>(call, rows, layout.row_blocks);
  }
}

void run(const GramCall& call, TileSet set, int row_blocks, const Placement& placement,
         bool only_last_row) {
  const GramLayout layout{set, row_blocks, placement, call.updates.count, only_last_row};
  if (call.num_pieces > 0) {
    switch (call.updates.dtype) {
      case Dtype::kFloat32:
        run_pieces<float>(call, layout);
        break;
      case Dtype::kBFloat16:
        run_pieces<__nv_bfloat16>(call, layout);
        break;
      case Dtype::kFloat16:
        run_pieces<__half>(call, layout);
        break;
    }
  }
  const unsigned entry_groups = count_tiles(set, row_blocks) * kTileEntries / 32;
  FEDCMT_RUN(gramian_finish, dim3(static_cast<unsigned>(call.num_segments), entry_groups),
             kFinishThreads, call.stream, call.partials, call.first_piece, call.num_pieces, layout,
             call.out);
}

int count_row_blocks(int rows) { return static_cast<int>(divide_up(rows, kTileSide)); }

// All pairs among rows [first, first + count), count <= 64.
void run_all_pairs(const GramCall& call, int first, int count, bool only_last_row) {
  run(call, TileSet::kTriangle, count_row_blocks(count), {first, count, 0, 0, kMaxGramRows},
      only_last_row);
}

void run_panels(const GramCall& call) {
  const int n = call.updates.count;
  for (int first = 0; first < n; first += kMaxGramRows) {
    run_all_pairs(call, first, std::min(kMaxGramRows, n - first), false);
  }
  for (int first = 0; first < n; first += kPanel) {
    const int next = first / kMaxGramRows * kMaxGramRows + kMaxGramRows;
    for (int second = next; second < n; second += kPanel) {
      run(call, TileSet::kRectangle, kMaxRowBlocks,
          {first, kPanel, second, std::min(kPanel, n - second), kPanel}, false);
    }
  }
}

// The last row has a block of its own; up to 56 others fill the blocks before it.
constexpr int kMaxOthers = kMaxGramRows - kTileSide;

int choose_last_row_blocks(int others) { return others <= 8 ? 2 : others <= 24 ? 4 : 8; }

void run_last_row(const GramCall& call) {
  const int n = call.updates.count;
  if (n <= kTileSide) return run_all_pairs(call, 0, n, true);
  for (int first = 0; first < n - 1; first += kMaxOthers) {
    const int others = std::min(kMaxOthers, n - 1 - first);
    const int row_blocks = choose_last_row_blocks(others);
    run(call, TileSet::kLastColumn, row_blocks,
        {first, others, n - 1, 1, (row_blocks - 1) * kTileSide}, true);
  }
}

int count_largest_tiles(int num_rows, bool only_last_row) {
  if (only_last_row && num_rows > kTileSide) {
    const int others = std::min(kMaxOthers, num_rows - 1);
    return count_tiles(TileSet::kLastColumn, choose_last_row_blocks(others));
  }
  const int row_blocks = count_row_blocks(std::min(num_rows, kMaxGramRows));
  return count_tiles(TileSet::kTriangle, row_blocks);
}

// Tables, then the partial sums of the launch that has most of them.
struct GramWorkspace {
  explicit GramWorkspace(const Segments& segments) : pieces(segments) {
    table = tables.add(pieces.table);
    first_piece = tables.add(pieces.first);
  }
  int64_t bytes(int num_rows, bool only_last_row) const {
    const int64_t entries = count_largest_tiles(num_rows, only_last_row) * kTileEntries;
    return tables.bytes() + pieces.count * entries * static_cast<int64_t>(sizeof(double));
  }

  SegmentPieces pieces;
  Tables tables;
  int64_t table, first_piece;
};

int run_gramian(const Rows& updates, const Segments& segments, double* out, const Launch& launch,
                bool only_last_row) {
  const DeviceGuard guard(launch.device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const GramWorkspace space(segments);
  const cudaError_t uploaded = space.tables.upload(launch.workspace, stream);
  if (uploaded != cudaSuccess) return uploaded;

  const bool single = segments.count == 1;
  const PieceSource pieces{single ? nullptr : at<const Piece>(launch.workspace, space.table),
                           space.pieces.length, space.pieces.piece_length};
  const GramCall call{updates,
                      are_aligned(updates),
                      pieces,
                      space.pieces.count,
                      single ? nullptr : at<const int64_t>(launch.workspace, space.first_piece),
                      segments.count,
                      at<double>(launch.workspace, space.tables.bytes()),
                      out,
                      stream};
  if (only_last_row) {
    run_last_row(call);
  } else if (updates.count <= kMaxGramRows) {
    run_all_pairs(call, 0, updates.count, false);
  } else {
    run_panels(call);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t gramian_workspace_bytes(const Rows& updates, const Segments& segments) {
  return GramWorkspace(segments).bytes(updates.count, false);
}

int gramian(const Rows& updates, const Segments& segments, double* grams, const Launch& launch) {
  return run_gramian(updates, segments, grams, launch, false);
}

int64_t gramian_row_workspace_bytes(const Rows& updates, const Segments& segments) {
  return GramWorkspace(segments).bytes(updates.count, true);
}

int gramian_row(const Rows& updates, const Segments& segments, double* row, const Launch& launch) {
  return run_gramian(updates, segments, row, launch, true);
}

}  // namespace cuda
}  // namespace fedcmt
