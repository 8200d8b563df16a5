// Vectors in pairs, vectors that reach beyond the end of an array, sums over the lanes of vectors.
// See block_kernels_impl.h for who includes this.

// Two vectors of values to out, in a fixed order. A path may have overloads that order some types
// in another way.
template <typename T>
inline void load_two(const T* p, float* out) {
  Floats::load(p).store(out);
  Floats::load(p + Floats::kLanes).store(out + Floats::kLanes);
}

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

// In a fixed order.
inline double add_lanes(const double* lanes) {
  double total = 0.0;
  for (int k = 0; k < Doubles::kLanes; ++k) total += lanes[k];
  return total;
}
inline void add_lanes_to(double* total, const Doubles (&sums)[2]) {
  double lanes[Doubles::kLanes];
  for (const Doubles& sum : sums) {
    sum.store(lanes);
    *total += add_lanes(lanes);
  }
}
