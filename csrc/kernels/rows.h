// Rows of pixels: reading and writing them in any layout, and the weighted sums of rows.
//
// A row in the workspace is dense: `lanes` values for each pixel, pixel after pixel. Behind it lies
// room (PADDING), so that loops may run on to a whole vector instead of finishing one by one, which
// matters for narrow maps; what they write there is overwritten or never read.

constexpr int64_t whole_vectors(int64_t count) { return (count + 15) & ~int64_t{15}; }

/// The part of a group of planes that is worked on.
struct Tile {
  int64_t n, c, lanes;
  int64_t row_begin, row_end, column_begin, column_end;

  int64_t columns() const { return column_end - column_begin; }
};

inline Tile tile_of_group(const Lanes &lanes, int64_t group) {
  const int64_t n = group / lanes.blocks();
  const int64_t c = group % lanes.blocks() * lanes.lane_block;
  return {n, c, std::min(lanes.lane_block, lanes.channels - c), 0, 0, 0, 0};
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

/// Asks for the `count` pixels of row `row`, which are used next. It may lie behind the last row:
/// in a contiguous tensor the next plane does.
template <class T>
void prefetch_row(const Maps &maps, const Tile &tile, int64_t row, int64_t column, int64_t count) {
  if (!has_dense_rows(maps, tile))
    return;
  const auto begin = reinterpret_cast<uintptr_t>(maps.at<const T>(tile.n, tile.c, row, column));
  for (uintptr_t line = begin; line < begin + count * tile.lanes * sizeof(T); line += 64)
    __builtin_prefetch(reinterpret_cast<const void *>(line));
}

template <class T>
void load_dense(const T *__restrict values, int64_t count, accumulator_t<T> *__restrict out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = widen(values[i]);
}

template <class T>
void store_dense(const accumulator_t<T> *__restrict values, int64_t count, T *__restrict out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = narrow<T>(values[i]);
}

#ifdef __F16C__
template <>
inline void load_dense(const Half *__restrict values, int64_t count, float *__restrict out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(
        out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values + i))));
  for (; i < count; ++i)
    out[i] = _cvtsh_ss(values[i].bits);
}

template <>
inline void store_dense(const float *__restrict values, int64_t count, Half *__restrict out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i)
    out[i].bits = _cvtss_sh(values[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

/// Copies `count` pixels of a row, from `column` on, into `out`.
template <class T>
void load_row_as(const Maps &maps, const Tile &tile, int64_t row, int64_t column, int64_t count,
                 accumulator_t<T> *__restrict out) {
  const T *pixels = maps.at<const T>(tile.n, tile.c, row, column);
  const int64_t lanes = tile.lanes, stride_w = maps.stride_w, stride_c = maps.stride_c;
  if (has_dense_rows(maps, tile))
    return load_dense(pixels, count * lanes, out);
  if (has_adjacent_lanes(maps, tile)) {
    for (int64_t pixel = 0; pixel < count; ++pixel)
      load_dense(pixels + pixel * stride_w, lanes, out + pixel * lanes);
    return;
  }
  for (int64_t pixel = 0; pixel < count; ++pixel)
    for (int64_t lane = 0; lane < lanes; ++lane)
      out[pixel * lanes + lane] = widen(pixels[pixel * stride_w + lane * stride_c]);
}

/// The same for rows [begin, end), one behind the other. Narrow rows gain by being one run.
template <class T>
void load_rows_as(const Maps &maps, const Tile &tile, int64_t begin, int64_t end, int64_t column,
                  int64_t count, accumulator_t<T> *out) {
  if (has_dense_planes(maps, tile, count))
    return load_row_as<T>(maps, tile, begin, column, (end - begin) * count, out);
  for (int64_t row = begin; row < end; ++row, out += count * tile.lanes)
    load_row_as<T>(maps, tile, row, column, count, out);
}

/// Rounds `count` pixels at `values` into a row, from `column` on.
template <class T>
void store_row_as(const Maps &maps, const Tile &tile, int64_t row, int64_t column, int64_t count,
                  const accumulator_t<T> *__restrict values) {
  T *pixels = maps.at<T>(tile.n, tile.c, row, column);
  const int64_t lanes = tile.lanes, stride_w = maps.stride_w, stride_c = maps.stride_c;
  if (has_dense_rows(maps, tile))
    return store_dense(values, count * lanes, pixels);
  if (has_adjacent_lanes(maps, tile)) {
    for (int64_t pixel = 0; pixel < count; ++pixel)
      store_dense(values + pixel * lanes, lanes, pixels + pixel * stride_w);
    return;
  }
  for (int64_t pixel = 0; pixel < count; ++pixel)
    for (int64_t lane = 0; lane < lanes; ++lane)
      pixels[pixel * stride_w + lane * stride_c] = narrow<T>(values[pixel * lanes + lane]);
}

/// The same for rows [begin, end).
template <class T>
void store_rows_as(const Maps &maps, const Tile &tile, int64_t begin, int64_t end, int64_t column,
                   int64_t count, const accumulator_t<T> *values) {
  if (has_dense_planes(maps, tile, count))
    return store_row_as<T>(maps, tile, begin, column, (end - begin) * count, values);
  for (int64_t row = begin; row < end; ++row, values += count * tile.lanes)
    store_row_as<T>(maps, tile, row, column, count, values);
}

// The dtype of x or grad is known when the kernel is compiled, that of a source or result is not.
#define REVBIFPN_FOR_DTYPE(dtype, function, ...)                                                   \
  if constexpr (std::is_same_v<Acc, double>)                                                       \
    function<double>(__VA_ARGS__);                                                                 \
  else if (dtype == Dtype::float32)                                                                \
    function<float>(__VA_ARGS__);                                                                  \
  else if (dtype == Dtype::bfloat16)                                                               \
    function<BFloat16>(__VA_ARGS__);                                                               \
  else                                                                                             \
    function<Half>(__VA_ARGS__);

template <class Acc>
void load_rows(const Maps &maps, const Tile &tile, int64_t begin, int64_t end, int64_t column,
               int64_t count, Acc *out) {
  REVBIFPN_FOR_DTYPE(maps.dtype, load_rows_as, maps, tile, begin, end, column, count, out)
}

template <class Acc>
void store_rows(const Maps &maps, const Tile &tile, int64_t begin, int64_t end, int64_t column,
                int64_t count, const Acc *values) {
  REVBIFPN_FOR_DTYPE(maps.dtype, store_rows_as, maps, tile, begin, end, column, count, values)
}

/// Rows `stride` apart; with a mask, rows of a ring.
template <class T> struct Rows {
  T *data;
  int64_t stride, mask = -1;

  T *operator[](int64_t i) const { return data + (i & mask) * stride; }
};

/// out (= or +=) TERMS weighted rows from `begin` on, added in order.
template <int TERMS, bool IS_FIRST, class T, class Acc>
REVBIFPN_INLINE void add_weighted_rows(Acc *out, const Rows<const T> &rows, int64_t begin,
                                       const Acc *weights, int64_t count) {
  const T *row[TERMS];
  Acc weight[TERMS];
  for (int term = 0; term < TERMS; ++term) {
    row[term] = rows[begin + term];
    weight[term] = weights[term];
  }
  REVBIFPN_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    Acc sum = weight[0] * widen(row[0][i]);
    if (!IS_FIRST)
      sum = out[i] + sum;
    for (int term = 1; term < TERMS; ++term)
      sum = sum + weight[term] * widen(row[term][i]);
    out[i] = sum;
  }
}

/// out = the sum of `terms` weighted rows from `begin` on, added in order whatever the grouping.
template <class T, class Acc>
void sum_weighted_rows(Acc *out, const Rows<const T> &rows, int64_t begin, const Acc *weights,
                       int64_t terms, int64_t count) {
  int64_t term = std::min<int64_t>(terms, 4);
  switch (term) {
  case 0:
    std::fill_n(out, count, Acc(0));
    break;
  case 1:
    add_weighted_rows<1, true>(out, rows, begin, weights, count);
    break;
  case 2:
    add_weighted_rows<2, true>(out, rows, begin, weights, count);
    break;
  case 3:
    add_weighted_rows<3, true>(out, rows, begin, weights, count);
    break;
  default:
    add_weighted_rows<4, true>(out, rows, begin, weights, count);
  }
  for (; term + 4 <= terms; term += 4)
    add_weighted_rows<4, false>(out, rows, begin + term, weights + term, count);
  for (; term < terms; ++term)
    add_weighted_rows<1, false>(out, rows, begin + term, weights + term, count);
}
