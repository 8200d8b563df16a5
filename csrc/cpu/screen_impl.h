// Measuring an update while it is copied. See block_kernels_impl.h for who includes this.

struct ScreenAccumulator {
  Doubles squares[2] = {Doubles::zero(), Doubles::zero()};
  Floats largest = Floats::broadcast(0.0f);
  int64_t nonfinite = 0;
};

inline void measure(Floats value, ScreenAccumulator* out) {
  out->nonfinite += value.count_nonfinite();
  const Floats finite = value.finite_or_zero();
  finite.add_squares(out->squares);
  out->largest = max(out->largest, finite.absolute());
}

// Values are measured as stored, so they are read back from where they were put.
template <typename From, typename To>
inline void copy_and_measure(const From* from, To* to, int64_t count, ScreenAccumulator* out) {
  int64_t e = 0;
  for (; e + Floats::kLanes <= count; e += Floats::kLanes) {
    Floats::load(from + e).store(to + e);
    measure(Floats::load(to + e), out);
  }
  if (e < count) {
    store_part(load_part(from + e, count - e), to + e, count - e);
    measure(load_part(to + e, count - e), out);
  }
}

template <typename From>
inline void measure_only(const From* from, int64_t count, ScreenAccumulator* out) {
  int64_t e = 0;
  for (; e + Floats::kLanes <= count; e += Floats::kLanes) measure(Floats::load(from + e), out);
  if (e < count) measure(load_part(from + e, count - e), out);
}

template <typename From>
inline void screen_typed(const From* from, const ScreenArguments& arguments, int64_t begin,
                         int64_t count, ScreenAccumulator* out) {
  if (arguments.to == nullptr) return measure_only(from + begin, count, out);
  switch (arguments.to_dtype) {
    case Dtype::kFloat32:
      return copy_and_measure(from + begin, static_cast<float*>(arguments.to) + begin, count, out);
    case Dtype::kBFloat16:
      return copy_and_measure(from + begin, static_cast<BFloat16*>(arguments.to) + begin, count,
                              out);
    case Dtype::kFloat16:
      return copy_and_measure(from + begin, static_cast<Float16*>(arguments.to) + begin, count,
                              out);
  }
}

void screen_block(const ScreenArguments& arguments, int64_t begin, int64_t end, ScreenSums* sums) {
  ScreenAccumulator out;
  with_type(&arguments.from, arguments.from_dtype, [&](const auto* rows) {
    screen_typed(rows[0], arguments, begin, end - begin, &out);
  });
  add_lanes_to(&sums->squares, out.squares);
  float values[Floats::kLanes];
  out.largest.store(values);
  for (const float value : values) sums->largest = value > sums->largest ? value : sums->largest;
  sums->nonfinite += out.nonfinite;
}
