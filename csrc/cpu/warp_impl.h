// Rows of a warped patch; csrc/patch.h defines every bit of the result.
//
// A path provides gather_two, gather_labels and all_true; see block_kernels_impl.h.

// Where the voxels of a vector lie between the samples of the source.
struct Cells {
  IntVector index[3];  // the lower corner along D, H, W
  FloatVector fraction[3];
  FloatVector weight[8];  // bit 2 of a corner's number is D, bit 1 H, bit 0 W
};

inline FloatVector to_floats(IntVector x) { return __builtin_convertvector(x, FloatVector); }

inline FloatVector lane_numbers(int first) {
  IntVector lanes;
  for (int k = 0; k < kVectorLanes; ++k) lanes[k] = first + k;
  return to_floats(lanes);
}

// base: the coordinate of the first voxel of a block; lanes: places in the block.
inline void locate(double base, float step, FloatVector lanes, IntVector* index,
                   FloatVector* fraction) {
  const double limited = base < -kWarpLimit ? -kWarpLimit : (base > kWarpLimit ? kWarpLimit : base);
  const double whole = __builtin_floor(limited);
  const FloatVector place = static_cast<float>(limited - whole) + lanes * step;
  IntVector cell = __builtin_convertvector(place, IntVector);
  cell += to_floats(cell) > place;
  *index = cell + static_cast<int32_t>(whole);
  *fraction = place - to_floats(cell);
}

// kFlat: all rows lie in slices of the source, so the upper corners along D have no weight.
template <bool kFlat>
inline void weigh(Cells* cells) {
  const FloatVector* f = cells->fraction;
  for (int corner = 0; corner < (kFlat ? 4 : 8); ++corner) {
    const FloatVector w = (corner & 1) != 0 ? f[2] : 1.0f - f[2];
    const FloatVector h = (corner & 2) != 0 ? f[1] : 1.0f - f[1];
    const FloatVector d = (corner & 4) != 0 ? f[0] : 1.0f - f[0];
    cells->weight[corner] = kFlat ? w * h : (w * h) * d;
  }
}

template <bool kFlat>
inline bool is_inside(const Cells& cells, const int64_t* source) {
  IntVector inside = cells.index[0] >= 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int32_t last = static_cast<int32_t>(source[axis]) - (kFlat && axis == 0 ? 0 : 1);
    inside &= (cells.index[axis] >= 0) & (cells.index[axis] < last);
  }
  return all_true(inside);
}

// Rounds non-negative values to half precision, ties to even: at the magnitude of `shift` the last
// bit of a float32 is worth as much as that of a half at the magnitude of the value.
inline FloatVector round_scores(FloatVector value) {
  IntVector exponent = (IntVector)value & 0x7f800000;
  const IntVector least = exponent - exponent + ((127 - 14) << 23);
  exponent = exponent > least ? exponent : least;
  const FloatVector shift = (FloatVector)(exponent + (13 << 23));
  return (value + shift) - shift;
}

template <int kCorners>
inline FloatVector score_of(IntVector label, const IntVector* labels, const FloatVector* weight) {
  FloatVector score = {};
  for (int corner = 0; corner < kCorners; ++corner) {
    score += labels[corner] == label ? weight[corner] * 1000.0f : FloatVector{};
  }
  return round_scores(score);
}

template <int kCorners>
inline IntVector nearest_label(const IntVector* labels, const Cells& cells) {
  IntVector upper[3];  // rounds half to even, as nearbyint does
  for (int axis = 0; axis < 3; ++axis) {
    const FloatVector fraction = cells.fraction[axis];
    upper[axis] = (fraction > 0.5f) | ((fraction == 0.5f) & ((cells.index[axis] & 1) != 0));
  }
  IntVector nearest = labels[0];
  for (int corner = 1; corner < kCorners; ++corner) {
    IntVector here = (corner & 1) != 0 ? upper[2] : ~upper[2];
    here &= (corner & 2) != 0 ? upper[1] : ~upper[1];
    if (kCorners == 8) here &= (corner & 4) != 0 ? upper[0] : ~upper[0];
    nearest = here ? labels[corner] : nearest;
  }
  return nearest;
}

template <int kCorners>
inline IntVector decide(const IntVector* labels, const Cells& cells) {
  IntVector differ = labels[1] != labels[0];
  for (int corner = 2; corner < kCorners; ++corner) differ |= labels[corner] != labels[0];
  if (all_true(~differ)) return labels[0];
  IntVector winner = labels[0];
  FloatVector largest = score_of<kCorners>(winner, labels, cells.weight);
  for (int corner = 1; corner < kCorners; ++corner) {
    const FloatVector score = score_of<kCorners>(labels[corner], labels, cells.weight);
    const IntVector better = (score > largest) | ((score == largest) & (labels[corner] < winner));
    winner = better ? labels[corner] : winner;
    largest = better ? score : largest;
  }
  const IntVector nearest = nearest_label<kCorners>(labels, cells);
  return score_of<kCorners>(nearest, labels, cells.weight) == largest ? nearest : winner;
}

// Reads the corners of vectors that reach beyond the source, one by one.
template <typename T, typename Vector>
inline void load_corners(const T* from, const int64_t* strides, const int64_t* source, T fill,
                         const Cells& cells, int count, int corners, Vector* values) {
  for (int corner = 0; corner < corners; ++corner) {
    Vector loaded = {};
    for (int k = 0; k < count; ++k) {
      const int64_t d = cells.index[0][k] + ((corner >> 2) & 1);
      const int64_t h = cells.index[1][k] + ((corner >> 1) & 1);
      const int64_t w = cells.index[2][k] + (corner & 1);
      const bool inside = d >= 0 && d < source[0] && h >= 0 && h < source[1] && w >= 0 &&
                          w < source[2];
      loaded[k] = inside ? from[d * strides[1] + h * strides[2] + w] : fill;
    }
    values[corner] = loaded;
  }
}

inline int64_t corner_shift(int corner, const int64_t* strides) {
  return ((corner >> 2) & 1) * strides[1] + ((corner >> 1) & 1) * strides[2] + (corner & 1);
}

inline IntVector corner_index(const Cells& cells, const int64_t* strides) {
  return cells.index[0] * static_cast<int32_t>(strides[1]) +
         cells.index[1] * static_cast<int32_t>(strides[2]) + cells.index[2];
}

template <bool kFlat>
inline void warp_image(const WarpArguments& a, const Cells& cells, bool inside, int count,
                       int64_t to) {
  constexpr int kCorners = kFlat ? 4 : 8;
  const int64_t voxels = a.shape[0] * a.shape[1] * a.shape[2];
  const IntVector index = corner_index(cells, a.image_strides);
  for (int c = 0; c < a.channels; ++c) {
    const float* from = a.image + c * a.image_strides[0];
    FloatVector values[8];
    if (inside) {
      for (int corner = 0; corner < kCorners; corner += 2) {
        gather_two(from + corner_shift(corner, a.image_strides), index, &values[corner],
                   &values[corner + 1]);
      }
    } else {
      load_corners(from, a.image_strides, a.source, 0.0f, cells, count, kCorners, values);
    }
    FloatVector sum = values[0] * cells.weight[0];
    for (int corner = 1; corner < kCorners; ++corner) sum += values[corner] * cells.weight[corner];
    store_vector_part(sum, a.out_image + c * voxels + to, count);
  }
}

template <bool kFlat>
inline void warp_labels(const WarpArguments& a, const Cells& cells, bool inside, int count,
                        int64_t to) {
  constexpr int kCorners = kFlat ? 4 : 8;
  const int64_t voxels = a.shape[0] * a.shape[1] * a.shape[2];
  const IntVector index = corner_index(cells, a.label_strides);
  for (int l = 0; l < a.label_maps; ++l) {
    const int16_t* from = a.labels + l * a.label_strides[0];
    IntVector labels[8];
    if (inside) {
      for (int corner = 0; corner < kCorners; corner += 2) {
        const IntVector two = gather_labels(from + corner_shift(corner, a.label_strides), index);
        labels[corner] = (two << 16) >> 16;
        labels[corner + 1] = two >> 16;
      }
    } else {
      load_corners(from, a.label_strides, a.source, a.label_fill, cells, count, kCorners, labels);
    }
    const ShortVector won = __builtin_convertvector(decide<kCorners>(labels, cells), ShortVector);
    store_vector_part(won, a.out_labels + l * voxels + to, count);
  }
}

template <bool kFlat>
inline void warp_row(const WarpArguments& a, int64_t row) {
  const auto z = static_cast<double>(row / a.shape[1]), y = static_cast<double>(row % a.shape[1]);
  const int64_t width = a.shape[2];
  double start[3];
  float step[3];
  for (int axis = 0; axis < 3; ++axis) {
    const double* m = a.affine + 4 * axis;
    start[axis] = (m[0] * z + m[1] * y) + m[3];
    step[axis] = static_cast<float>(m[2]);
  }
  for (int64_t x = 0; x < width; x += kVectorLanes) {
    const int64_t block = x / kWarpBlock * kWarpBlock;
    const FloatVector lanes = lane_numbers(static_cast<int>(x - block));
    const int count = static_cast<int>(width - x < kVectorLanes ? width - x : kVectorLanes);
    Cells cells;
    for (int axis = 0; axis < 3; ++axis) {
      const double base = start[axis] + static_cast<double>(block) * a.affine[4 * axis + 2];
      locate(base, step[axis], lanes, &cells.index[axis], &cells.fraction[axis]);
    }
    weigh<kFlat>(&cells);
    const bool inside = is_inside<kFlat>(cells, a.source);
    warp_image<kFlat>(a, cells, inside, count, row * width + x);
    warp_labels<kFlat>(a, cells, inside, count, row * width + x);
  }
}

void warp_rows(const WarpArguments& a, int64_t begin, int64_t end) {
  // Slices stay slices: each lies in one of the source, as in augmentation slice by slice.
  const double* m = a.affine;
  const bool flat = m[1] == 0.0 && m[2] == 0.0 && m[0] == __builtin_floor(m[0]) &&
                    m[3] == __builtin_floor(m[3]);
  for (int64_t row = begin; row < end; ++row) {
    if (flat) {
      warp_row<true>(a, row);
    } else {
      warp_row<false>(a, row);
    }
  }
}
