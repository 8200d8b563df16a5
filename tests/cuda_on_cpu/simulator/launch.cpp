// One launch: every block of the grid in turn.
#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "block.h"
#include "memory.h"
#include "pool.h"
#include "runtime.h"

namespace cuda_on_cpu {

Index block_index;
Index block_size;
Index grid_size;

namespace {

size_t volume(const Index& index) { return size_t{index.x} * index.y * index.z; }

bool is_valid(const Index& grid, const Index& block, size_t dynamic_bytes) {
  return volume(grid) > 0 && volume(block) > 0 && volume(block) <= kMaxThreads &&
         grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && block.z <= 64 &&
         dynamic_bytes <= kMaxDynamicBytes;
}

void run_blocks(size_t dynamic_bytes, Body body, const void* arguments) {
  static uint64_t launches = 0;
  Order order = Order::from_environment(++launches);
  std::vector<unsigned> blocks(volume(grid_size));
  order.arrange(blocks.data(), static_cast<unsigned>(blocks.size()));
  Pool& pool = Pool::instance();
  pool.begin_launch();
  void* const begin = new_clock();
  release(begin);
  for (size_t turn = 0; turn < blocks.size(); ++turn) {
    const unsigned number = blocks[turn];
    block_index = {number % grid_size.x, number / grid_size.x % grid_size.y,
                   number / (grid_size.x * grid_size.y)};
    const Slot slot = pool.take(turn);
    void* const end = new_clock();
    begin_shared_memory(slot.arena, dynamic_bytes);
    run_block(&order, {body, arguments, {begin, *slot.ended}, end});
    end_shared_memory();
    *slot.ended = end;
  }
  pool.end_launch();
}

}  // namespace

void* new_clock() {
  if (!kChecksRaces) return nullptr;
  constexpr size_t kBytes = size_t{1} << 36;  // never touched: only the addresses count
  static char* const clocks = map_memory(kBytes);
  static size_t used = 0;
  used += 8;
  return clocks + used % kBytes;
}

void run_grid(Index grid, Index block, size_t dynamic_bytes, Body body, const void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!is_valid(grid, block, dynamic_bytes)) {
    set_last_error(cudaErrorInvalidConfiguration);
    return;
  }
  block_size = block;
  grid_size = grid;
  num_threads = static_cast<int>(volume(block));
  run_blocks(dynamic_bytes, body, arguments);
}

}  // namespace cuda_on_cpu
