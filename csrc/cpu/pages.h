// Giving back the memory of rows that are mapped from files.
#pragma once

#include "../ops.h"

namespace fedcmt {
namespace cpu {

// The pages of elements [begin, end) leave this process; the next access reads the file again. Only
// for rows that are mapped from files and were not written: elsewhere it would destroy them.
void release_pages(const Rows& rows, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace fedcmt
