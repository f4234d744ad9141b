// Rows of pixels: reading and writing them in any layout, and the weighted sums of rows.
//
// A row in the workspace is dense: `lanes` values for each pixel, pixel after pixel. After it
// comes PADDING, so that loops may run on to a whole vector instead of finishing one by one, which
// matters for narrow maps; the values that they write there are overwritten or never read.

template <class Acc> constexpr int64_t whole_vectors(int64_t count) {
  return (count + WIDTH<Acc> - 1) / WIDTH<Acc> * WIDTH<Acc>;
}

/// The part of a group of planes that is worked on.
struct Tile {
  int64_t n, c, lanes;
  int64_t row_begin, row_end, column_begin, column_end;

  int64_t columns() const { return column_end - column_begin; }
};

inline Tile tile_of_group(const PlaneGroups &groups, int64_t group) {
  const int64_t n = group / groups.per_image();
  const int64_t c = group % groups.per_image() * groups.lane_block;
  return {n, c, std::min(groups.lane_block, groups.channels - c), 0, 0, 0, 0};
}

/// Whether the lanes of a pixel sit side by side, so that loops can run over them where they lie.
inline bool has_adjacent_lanes(const Maps &maps, const Tile &tile) {
  return tile.lanes == 1 ? maps.stride_w == 1 : maps.stride_c == 1;
}

/// Whether moreover the pixels of a row sit side by side.
inline bool has_dense_rows(const Maps &maps, const Tile &tile) {
  return has_adjacent_lanes(maps, tile) && maps.stride_w == tile.lanes;
}

/// Whether `count` pixels of one row after another are one dense run.
inline bool has_dense_planes(const Maps &maps, const Tile &tile, int64_t count) {
  return has_dense_rows(maps, tile) && maps.stride_h == count * tile.lanes;
}

/// Prefetches the `count` pixels of row `row`, which are used next. The row may lie after the last
/// one, where the next plane of a contiguous tensor begins.
template <class T>
void prefetch_row(const Maps &maps, const Tile &tile, int64_t row, int64_t column, int64_t count) {
  if (!has_dense_rows(maps, tile))
    return;
  const auto begin = reinterpret_cast<uintptr_t>(maps.at<const T>(tile.n, tile.c, row, column));
  for (uintptr_t line = begin; line < begin + count * tile.lanes * sizeof(T); line += 64)
    __builtin_prefetch(reinterpret_cast<const void *>(line));
}

/// Converts a run of elements; the last vector may overlap the one before it.
template <class From, class To> void convert_run(const From *from, int64_t count, To *to) {
  constexpr int64_t STEP = WIDTH<accumulator_t<From>>;
  if (count < STEP)
    return store_first(load_first(from, count), to, count);
  for (int64_t i = 0; i + STEP < count; i += STEP)
    store_vector(load_vector(from + i), to + i);
  store_vector(load_vector(from + count - STEP), to + count - STEP);
}

// How elements move from memory into the workspace, and back with one rounding.
struct Load {
  template <class T, class Acc> static void one(const T &pixel, Acc &value) {
    value = widen(pixel);
  }
  template <class T, class Acc> static void run(const T *pixels, int64_t count, Acc *values) {
    convert_run(pixels, count, values);
  }
};

struct Store {
  template <class T, class Acc> static void one(T &pixel, Acc value) { pixel = narrow<T>(value); }
  template <class T, class Acc> static void run(T *pixels, int64_t count, const Acc *values) {
    convert_run(values, count, pixels);
  }
};

/// Moves `count` pixels of a row, from `column` on.
template <class Move, class T, class Acc>
void move_row(const Maps &maps, const Tile &tile, int64_t row, int64_t column, int64_t count,
              Acc *__restrict values) {
  T *pixels = maps.at<T>(tile.n, tile.c, row, column);
  const int64_t lanes = tile.lanes, stride_w = maps.stride_w, stride_c = maps.stride_c;
  if (has_dense_rows(maps, tile))
    return Move::run(pixels, count * lanes, values);
  if (has_adjacent_lanes(maps, tile)) {
    for (int64_t pixel = 0; pixel < count; ++pixel)
      Move::run(pixels + pixel * stride_w, lanes, values + pixel * lanes);
    return;
  }
  for (int64_t pixel = 0; pixel < count; ++pixel)
    for (int64_t lane = 0; lane < lanes; ++lane)
      Move::one(pixels[pixel * stride_w + lane * stride_c], values[pixel * lanes + lane]);
}

/// Moves rows [begin, end), one after the other; in one run where they are dense, which is faster
/// for narrow rows.
template <class Move, class T, class Acc>
void move_rows(const Maps &maps, const Tile &tile, int64_t begin, int64_t end, int64_t column,
               int64_t count, Acc *values) {
  if (has_dense_planes(maps, tile, count))
    return move_row<Move, T>(maps, tile, begin, column, (end - begin) * count, values);
  for (int64_t row = begin; row < end; ++row, values += count * tile.lanes)
    move_row<Move, T>(maps, tile, row, column, count, values);
}

/// The same where the type of the elements is not known when the kernel is compiled, as that of x
/// or grad is.
template <class Move, class Acc>
void move_rows_of_any(const Maps &maps, const Tile &tile, int64_t begin, int64_t end,
                      int64_t column, int64_t count, Acc *values) {
  if constexpr (std::is_same_v<std::remove_const_t<Acc>, double>)
    move_rows<Move, double>(maps, tile, begin, end, column, count, values);
  else if (maps.dtype == Dtype::float32)
    move_rows<Move, float>(maps, tile, begin, end, column, count, values);
  else if (maps.dtype == Dtype::bfloat16)
    move_rows<Move, BFloat16>(maps, tile, begin, end, column, count, values);
  else
    move_rows<Move, Half>(maps, tile, begin, end, column, count, values);
}

/// Rows `stride` apart; with a mask, rows of a ring.
template <class T> struct Rows {
  T *data;
  int64_t stride, mask = -1;

  T *operator[](int64_t i) const { return data + (i & mask) * stride; }
};

/// COUNT vectors of the sum of `terms` weighted rows from `begin` on, added in order. Of a single
/// vector only the first `lanes` lanes are read and written.
template <int COUNT, class T, class Acc>
REVBIFPN_INLINE void sum_vectors(const Rows<const T> &rows, int64_t begin, const Acc *weights,
                                 int64_t terms, int64_t i, int64_t lanes, Acc *out) {
  using Vector = vector_of<Acc>;
  Vector sums[COUNT] = {};
  for (int64_t term = 0; term < terms; ++term) {
    const T *row = rows[begin + term] + i;
    const Vector weight = splat<Vector>(weights[term]);
    REVBIFPN_UNROLLED(k, COUNT)
    sums[k] = multiply_add(weight, load_lanes(row + k * WIDTH<Acc>, lanes), sums[k]);
  }
  REVBIFPN_UNROLLED(k, COUNT) store_lanes(sums[k], out + i + k * WIDTH<Acc>, lanes);
}

/// out = the sum of `terms` weighted rows from `begin` on. The sums stay in registers, of several
/// vectors at a time, because each addition waits for the one before; the last may overlap.
template <class T, class Acc>
void sum_weighted_rows(Acc *out, const Rows<const T> &rows, int64_t begin, const Acc *weights,
                       int64_t terms, int64_t count) {
  constexpr int64_t STEP = WIDTH<Acc>;
  if (count < STEP)
    return sum_vectors<1>(rows, begin, weights, terms, 0, count, out);
  int64_t i = 0;
  for (; i + 4 * STEP <= count; i += 4 * STEP)
    sum_vectors<4>(rows, begin, weights, terms, i, STEP, out);
  const int64_t block = count < 2 * STEP ? STEP : 2 * STEP;
  for (; i < count; i += block)
    if (const int64_t at = std::min(i, count - block); block == STEP)
      sum_vectors<1>(rows, begin, weights, terms, at, STEP, out);
    else
      sum_vectors<2>(rows, begin, weights, terms, at, STEP, out);
}
