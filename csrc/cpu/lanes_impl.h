// Vectors of the compiler, as wide as Floats: arithmetic, comparisons (true is -1) and `mask ? a : b`
// by lane, without contraction. See block_kernels_impl.h for who includes this.

constexpr int kVectorLanes = Floats::kLanes;
typedef float FloatVector __attribute__((vector_size(4 * kVectorLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kVectorLanes)));
typedef uint32_t UintVector __attribute__((vector_size(4 * kVectorLanes)));
typedef int16_t ShortVector __attribute__((vector_size(2 * kVectorLanes)));

inline FloatVector load_vector(const float* from) {
  FloatVector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// The first count values, then copies of `rest`; count may exceed a vector.
inline FloatVector load_vector_part(const float* from, int64_t count, float rest) {
  if (count >= kVectorLanes) return load_vector(from);
  FloatVector v = FloatVector{} + rest;
  for (int k = 0; k < count; ++k) v[k] = from[k];
  return v;
}

// The same for stores. Without the first case each vector would be a call of memcpy.
template <typename Vector, typename T>
inline void store_vector_part(Vector v, T* to, int64_t count) {
  if (count >= kVectorLanes) {
    __builtin_memcpy(to, &v, sizeof v);
  } else {
    __builtin_memcpy(to, &v, count * sizeof(T));
  }
}
