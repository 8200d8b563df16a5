// The block kernels, written once over the vector types of a path.
//
// Included by plain.cpp, avx2.cpp and avx512.cpp inside an anonymous namespace, after they define
//   BFloat16, Float16      structs that hold the bits of a value
//   Doubles, Floats        vectors of Doubles::kLanes float64 and Floats::kLanes float32
//   load_two(p, out)       where the path has one of its own for a type; see part_impl.h
//   gather_two, gather_labels, all_true, multiply_high   on the vectors of lanes_impl.h
//   kTile                  rows and columns of the Gramian's register tile
// It must include no other header: see block_kernels.h.

#include "part_impl.h"
#include "gramian_impl.h"
#include "step_impl.h"
#include "screen_impl.h"
#include "warp_impl.h"
#include "intensity_impl.h"
#include "norm_impl.h"
