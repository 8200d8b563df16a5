// Vectors of the compiler, as wide as Floats: arithmetic, comparisons (true is -1) and `mask ? a : b`
// by lane, without contraction. See block_kernels_impl.h for who includes this.

constexpr int kVectorLanes = Floats::kLanes;
typedef float FloatVector __attribute__((vector_size(4 * kVectorLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kVectorLanes)));
typedef int16_t ShortVector __attribute__((vector_size(2 * kVectorLanes)));
