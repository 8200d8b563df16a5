// Cutting rows into pieces: one block works on one piece, which lies inside one segment.
//
// Cuts are made at multiples of one length that follows from P alone, so a packet of 16 bytes is
// split between pieces only where a segment begins or ends.
#pragma once

#include <algorithm>
#include <vector>

#include "packet.cuh"

namespace fedcmt {
namespace cuda {

constexpr int64_t kPieceGranularity = 4096;

struct Piece {
  Range range;
  int64_t segment;
};

// How a kernel finds its piece: by formula where there is one segment, else in a table.
struct PieceSource {
  const Piece* table;  // or nullptr
  int64_t length, piece_length;
};

__device__ __forceinline__ Piece find_piece(const PieceSource& source, int64_t index) {
  if (source.table != nullptr) return source.table[index];
  const int64_t begin = index * source.piece_length;
  const int64_t end = begin + source.piece_length;
  return {{begin, end < source.length ? end : source.length}, 0};
}

// A piece in steps of kStep elements at multiples of kStep. The whole steps are numbered first,
// then the ones that the piece shares with a neighbour: at most its first and its last.
template <int kStep>
struct Steps {
  int64_t first, end, first_whole, whole;

  __device__ __forceinline__ explicit Steps(const Range& range)
      : first(range.begin / kStep),
        end(divide_up(range.end, kStep)),
        first_whole(divide_up(range.begin, kStep)),
        whole(range.end / kStep - first_whole) {
    if (whole < 0) whole = 0;
  }
  __device__ __forceinline__ int64_t count() const { return end - first; }
  // First element of a step.
  __device__ __forceinline__ int64_t start(int64_t number) const {
    if (number < whole) return (first_whole + number) * kStep;
    return (number == whole && first < first_whole ? first : end - 1) * kStep;
  }
};

inline int64_t choose_piece_length(int64_t length) {
  const int64_t least = std::max<int64_t>(1, divide_up(length, kMaxBlocks));
  return divide_up(least, kPieceGranularity) * kPieceGranularity;
}

// Host side: the pieces of all segments in order. The tables stay empty for one segment.
struct SegmentPieces {
  explicit SegmentPieces(const Segments& segments)
      : length(segments.bounds[segments.count]), piece_length(choose_piece_length(length)) {
    if (segments.count == 1) {
      count = divide_up(length, piece_length);
      return;
    }
    for (int s = 0; s < segments.count; ++s) {
      first.push_back(static_cast<int64_t>(table.size()));
      add_segment({segments.bounds[s], segments.bounds[s + 1]}, s);
    }
    count = static_cast<int64_t>(table.size());
    first.push_back(count);
  }

  int64_t length, piece_length, count;
  std::vector<Piece> table;    // [count]
  std::vector<int64_t> first;  // [S + 1], piece with which a segment begins

 private:
  void add_segment(const Range& segment, int64_t index) {
    for (int64_t begin = segment.begin; begin < segment.end;) {
      const int64_t cut = (begin / piece_length + 1) * piece_length;
      const int64_t end = std::min(cut, segment.end);
      table.push_back({{begin, end}, index});
      begin = end;
    }
  }
};

}  // namespace cuda
}  // namespace fedcmt
