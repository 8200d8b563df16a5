// Vectors that reach beyond the end of an array. See block_kernels_impl.h for who includes this.

// The first count elements, then zeros; count may exceed a vector.
template <typename T>
inline Floats load_part(const T* from, int64_t count) {
  if (count >= Floats::kLanes) return Floats::load(from);
  T part[Floats::kLanes] = {};
  for (int64_t k = 0; k < count; ++k) part[k] = from[k];
  return Floats::load(part);
}

template <typename T>
inline void store_part(Floats value, T* to, int64_t count) {
  if (count >= Floats::kLanes) return value.store(to);
  T part[Floats::kLanes];
  value.store(part);
  for (int64_t k = 0; k < count; ++k) to[k] = part[k];
}
