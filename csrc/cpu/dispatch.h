// Which instruction-set path runs; chosen once from cpuid, changed by set_path in ops.h.
#pragma once

#include "block_kernels.h"

namespace fedcmt {
namespace cpu {

const BlockKernels& current_kernels();

}  // namespace cpu
}  // namespace fedcmt
