// gram[i][j] = sum_e rows[i][e] * rows[j][e], one pass over the rows.
//
// Up to 8 rows keep the whole triangle of sums in registers; up to 64 rows go through a tile in
// shared memory; more rows are taken as unions of two panels of 32, one launch for each pair of
// panels. Every block writes its partial sums, and a second kernel adds them in a fixed order: no
// atomics. Products and sums are float64; a product of two float32 values is then exact.
#include <algorithm>

#include "device.cuh"

namespace fedcmt {
namespace cuda {
namespace {

constexpr int kMaxRegisterRows = 8;
constexpr int kMaxRows = 64;
constexpr int kPanel = kMaxRows / 2;
constexpr int kChunk = 64;            // elements of each row in the shared tile
constexpr int kPitch = kMaxRows + 4;  // of the shared tile; spreads a column over the banks
constexpr int64_t kElementsABlock = 4096;

// Passed by value, so the pointers sit in constant memory and need no copy of their own.
struct Rows {
  const void* pointer[kMaxRows];
};

// The rows of a launch in the full matrix: the first `split` follow `first`, the rest `second`.
struct Placement {
  int first, second, split, total;
};

__host__ __device__ inline int count_pairs(int n) { return n * (n + 1) / 2; }

// Position of (row, column), column >= row, in the packed upper triangle of n rows.
__device__ __forceinline__ int pair_index(int row, int column, int n) {
  return row * n - row * (row - 1) / 2 + column - row;
}

// partials: [pairs, blocks]
template <typename T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    gramian_in_registers(Rows rows, int64_t length, double* __restrict__ partials) {
  constexpr int kPairs = kRows * (kRows + 1) / 2;
  constexpr int kSize = Packet<T>::kSize;
  double sums[kPairs];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) sums[p] = 0.0;

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  for (; e < length; e += stride) {
    Packet<T> packets[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      packets[i] = load_packet<T, kAligned>(static_cast<const T*>(rows.pointer[i]), e, length);
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      double x[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i] = to_float(packets[i].value[k]);
#pragma unroll
      for (int i = 0, p = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = i; j < kRows; ++j, ++p) sums[p] = fma(x[i], x[j], sums[p]);
      }
    }
  }
  FEDCMT_SHARED(double, warp_sums, [kPairs][kWarps]);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const double total = block_sum(sums[p], warp_sums[p]);
    if (threadIdx.x == 0) partials[static_cast<int64_t>(p) * gridDim.x + blockIdx.x] = total;
  }
}

// Each thread owns one 4 x 4 tile of the triangle for every groups-th element of a chunk.
struct TileTask {
  int row, column;  // of the tile's first entry
};

__device__ __forceinline__ TileTask find_tile(int index, int tiles_a_side) {
  int row = 0;
  for (; index >= tiles_a_side - row; ++row) index -= tiles_a_side - row;
  return {4 * row, 4 * (row + index)};
}

template <typename T>
__device__ __forceinline__ void stage_chunk(const Rows& rows, int n, int64_t begin, int64_t length,
                                            float* chunk) {
  const int padded = (n + 3) / 4 * 4;
  for (int k = threadIdx.x; k < padded * kChunk; k += kThreads) {
    const int row = k / kChunk, e = k % kChunk;
    const bool inside = row < n && begin + e < length;
    chunk[e * kPitch + row] =
        inside ? to_float(static_cast<const T*>(rows.pointer[row])[begin + e]) : 0.0f;
  }
}

// partials: [pairs, blocks]
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gramian_in_shared(Rows rows, int n, int64_t length, double* __restrict__ partials) {
  constexpr int kMaxTiles = (kMaxRows / 4) * (kMaxRows / 4 + 1) / 2;
  FEDCMT_SHARED(float, chunk, [kChunk * kPitch]);
  FEDCMT_SHARED(double, totals, [kMaxTiles * 16]);
  const int tiles_a_side = (n + 3) / 4;
  const int tiles = count_pairs(tiles_a_side);
  const int groups = kThreads / tiles;
  const int group = threadIdx.x / tiles;
  const TileTask task = find_tile(threadIdx.x % tiles, tiles_a_side);

  double sums[16];
#pragma unroll
  for (int k = 0; k < 16; ++k) sums[k] = 0.0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kChunk;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk; begin < length; begin += stride) {
    stage_chunk<T>(rows, n, begin, length, chunk);
    __syncthreads();
    for (int e = group; group < groups && e < kChunk; e += groups) {
      const float* column = chunk + e * kPitch;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        sums[k] = fma(static_cast<double>(column[task.row + k / 4]),
                      static_cast<double>(column[task.column + k % 4]), sums[k]);
      }
    }
    __syncthreads();
  }
  const int tile = threadIdx.x % tiles;
  for (int turn = 0; turn < groups; ++turn) {  // one group after the other: a fixed order
    if (group == turn) {
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        totals[tile * 16 + k] = turn == 0 ? sums[k] : totals[tile * 16 + k] + sums[k];
      }
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < tiles * 16; k += kThreads) {
    const TileTask place = find_tile(k / 16, tiles_a_side);
    const int row = place.row + k % 16 / 4, column = place.column + k % 4;
    if (row <= column && column < n) {
      const int64_t pair = pair_index(row, column, n);
      partials[pair * gridDim.x + blockIdx.x] = totals[k];
    }
  }
}

// One block for each pair of rows: adds the partial sums of all blocks and writes both triangles.
__global__ void __launch_bounds__(kThreads)
    gramian_finish(const double* __restrict__ partials, int blocks, int n, Placement place,
                   double* __restrict__ gram) {
  FEDCMT_SHARED(double, warp_sums, [kWarps]);
  const int64_t pair = blockIdx.x;
  double sum = 0.0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) sum += partials[pair * blocks + b];
  sum = block_sum(sum, warp_sums);
  if (threadIdx.x != 0) return;
  int row = 0, rest = static_cast<int>(pair);
  for (; rest >= n - row; ++row) rest -= n - row;
  int column = row + rest;
  row = row < place.split ? place.first + row : place.second + row - place.split;
  column = column < place.split ? place.first + column : place.second + column - place.split;
  gram[static_cast<int64_t>(row) * place.total + column] = sum;
  gram[static_cast<int64_t>(column) * place.total + row] = sum;
}

template <typename T, int kRows>
void launch_in_registers(const Rows& rows, int n, bool aligned, int64_t length, int blocks,
                         double* partials, cudaStream_t stream) {
  if constexpr (kRows <= kMaxRegisterRows) {
    if (n != kRows) {
      launch_in_registers<T, kRows + 1>(rows, n, aligned, length, blocks, partials, stream);
    } else if (aligned) {
      FEDCMT_LAUNCH((gramian_in_registers<T, kRows, true>), blocks, kThreads, stream, rows, length,
                    partials);
    } else {
      FEDCMT_LAUNCH((gramian_in_registers<T, kRows, false>), blocks, kThreads, stream, rows, length,
                    partials);
    }
  }
}

struct Launch {
  const void* const* updates;
  int64_t length;
  double* partials;
  double* gram;
  cudaStream_t stream;
};

template <typename T>
void launch_rows(const Launch& launch, const Placement& place, int n) {
  Rows rows{};
  bool aligned = true;
  for (int i = 0; i < n; ++i) {
    const int row = i < place.split ? place.first + i : place.second + i - place.split;
    rows.pointer[i] = launch.updates[row];
    aligned = aligned && is_aligned(rows.pointer[i]);
  }
  const int blocks = static_cast<int>(count_grid_blocks(launch.length, kElementsABlock));
  if (n <= kMaxRegisterRows) {
    launch_in_registers<T, 1>(rows, n, aligned, launch.length, blocks, launch.partials,
                              launch.stream);
  } else {
    FEDCMT_LAUNCH(gramian_in_shared<T>, blocks, kThreads, launch.stream, rows, n, launch.length,
                  launch.partials);
  }
  FEDCMT_LAUNCH(gramian_finish, count_pairs(n), kThreads, launch.stream, launch.partials, blocks, n,
                place, launch.gram);
}

template <typename T>
void launch_all(const Launch& launch, int n) {
  if (n <= kMaxRows) return launch_rows<T>(launch, {0, 0, n, n}, n);
  for (int first = 0; first < n; first += kPanel) {
    for (int second = first + kPanel; second < n; second += kPanel) {
      launch_rows<T>(launch, {first, second, kPanel, n}, kPanel + std::min(kPanel, n - second));
    }
  }
}

}  // namespace

int64_t gramian_workspace_bytes(int num_updates, int64_t length) {
  return sizeof(double) * count_pairs(std::min(num_updates, kMaxRows)) *
         count_grid_blocks(length, kElementsABlock);
}

int gramian(const void* const* updates, int num_updates, int64_t length, Dtype dtype,
            void* workspace, double* gram, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const Launch launch{updates, length, static_cast<double*>(workspace), gram,
                      static_cast<cudaStream_t>(stream)};
  switch (dtype) {
    case Dtype::kFloat32:
      launch_all<float>(launch, num_updates);
      break;
    case Dtype::kBFloat16:
      launch_all<__nv_bfloat16>(launch, num_updates);
      break;
    case Dtype::kFloat16:
      launch_all<__half>(launch, num_updates);
      break;
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace fedcmt
