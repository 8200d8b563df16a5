#include "pages.h"

#include <sys/mman.h>
#include <unistd.h>

namespace fedcmt {
namespace cpu {

void release_pages(const Rows& rows, int64_t begin, int64_t end) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const int64_t size = rows.dtype == Dtype::kFloat32 ? 4 : 2;
  for (int i = 0; i < rows.count; ++i) {
    const auto address = reinterpret_cast<uintptr_t>(rows.pointer[i]);
    // A page that two blocks share goes with the later one; a row's last page goes with its end.
    const uintptr_t first = (address + begin * size) / page * page;
    const uintptr_t rounding = end == rows.length ? page - 1 : 0;
    const uintptr_t last = (address + end * size + rounding) / page * page;
    if (last > first) {
      (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
  }
}

}  // namespace cpu
}  // namespace fedcmt
