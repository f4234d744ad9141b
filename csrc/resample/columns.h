// The horizontal half of a resampling: one dense row of a source to one dense row of a strip.

/// Outputs [begin, end) by the table of taps; `row` starts at pixel `origin` of the source.
template <class Acc>
void enlarge_by_table(const Taps<Acc> &taps, const Acc *row, int64_t origin, int64_t lanes,
                      int64_t begin, int64_t end, Acc *out) {
  for (int64_t j = begin; j < end; ++j, out += lanes) {
    const Acc *first = row + (taps.first[j] - origin) * lanes;
    const Acc *second = row + (taps.second[j] - origin) * lanes;
    if (lanes == 1) {
      *out = multiply_add(taps.weight_second[j], *second, taps.weight_first[j] * *first);
      continue;
    }
    const auto weight_first = splat<vector_of<Acc>>(taps.weight_first[j]);
    const auto weight_second = splat<vector_of<Acc>>(taps.weight_second[j]);
    for (int64_t lane = 0; lane < lanes; lane += WIDTH<Acc>)
      store_vector(multiply_add(weight_second, load_vector(second + lane),
                                weight_first * load_vector(first + lane)),
                   out + lane);
  }
}

/// The first values, each in FACTOR lanes.
template <int FACTOR, class Acc> REVBIFPN_INLINE vector_of<Acc> repeat_values(const Acc *values) {
  if constexpr (FACTOR >= WIDTH<Acc>)
    return splat<vector_of<Acc>>(*values);
  else
    return [&]<size_t... LANES>(std::index_sequence<LANES...>) {
      const vector_of<Acc> vector = load_vector(values);
      return __builtin_shufflevector(vector, vector, (LANES / FACTOR)...);
    }(std::make_index_sequence<WIDTH<Acc>>{});
}

/// Between the centres of two source pixels lie FACTOR outputs with the same weights everywhere.
template <int FACTOR, class Acc>
void enlarge_between(const Taps<Acc> &taps, const Acc *row, int64_t pixels, Acc *out) {
  constexpr int VECTORS = std::max(FACTOR / WIDTH<Acc>, 1);
  vector_of<Acc> weight_first[VECTORS], weight_second[VECTORS];
  for (int lane = 0; lane < VECTORS * WIDTH<Acc>; ++lane) {
    const int output = FACTOR / 2 + lane % FACTOR;
    weight_first[lane / WIDTH<Acc>][lane % WIDTH<Acc>] = taps.weight_first[output];
    weight_second[lane / WIDTH<Acc>][lane % WIDTH<Acc>] = taps.weight_second[output];
  }
  const Acc *end = row + pixels;
  for (; row < end; row += std::max(WIDTH<Acc> / FACTOR, 1)) {
    const auto first = repeat_values<FACTOR>(row), second = repeat_values<FACTOR>(row + 1);
    REVBIFPN_UNROLLED(i, VECTORS) {
      store_vector(multiply_add(weight_second[i], second, weight_first[i] * first), out);
      out += WIDTH<Acc>;
    }
  }
}

/// One plane enlarged by a power of two: constant weights, and the table before the centre of the
/// first pixel and after that of the last.
template <int FACTOR, class Acc>
void enlarge_plane(const Source<Acc> &source, const Acc *row, int64_t origin, int64_t begin,
                   int64_t end, Acc *out) {
  const int64_t half = FACTOR / 2;
  const int64_t first = std::max<int64_t>(0, (begin - half + FACTOR - 1) / FACTOR);
  const int64_t last = std::min((end - half) / FACTOR, source.maps.width - 1);
  if (last <= first)
    return enlarge_by_table(source.columns, row, origin, 1, begin, end, out);
  const int64_t inner_begin = half + first * FACTOR, inner_end = half + last * FACTOR;
  enlarge_between<FACTOR>(source.columns, row + (first - origin), last - first,
                          out + (inner_begin - begin));
  enlarge_by_table(source.columns, row, origin, 1, begin, inner_begin, out);
  enlarge_by_table(source.columns, row, origin, 1, inner_end, end, out + (inner_end - begin));
}

template <class Acc>
void enlarge_columns(const Source<Acc> &source, const Tile &tile, const Acc *row, int64_t origin,
                     Acc *out) {
  const int64_t begin = tile.column_begin, end = tile.column_end;
  const bool is_done =
      tile.lanes == 1 && with_constant<2, 4, 8>(source.enlarge_w, [&]<int FACTOR>() {
        enlarge_plane<FACTOR>(source, row, origin, begin, end, out);
      });
  if (!is_done)
    enlarge_by_table(source.columns, row, origin, tile.lanes, begin, end, out);
}

template <class Acc>
void pick_columns(const Taps<Acc> &taps, const Tile &tile, const Acc *row, int64_t origin,
                  Acc *out) {
  if (tile.lanes == 1) {
    for (int64_t j = tile.column_begin; j < tile.column_end; ++j)
      *out++ = row[taps.first[j] - origin];
    return;
  }
  for (int64_t j = tile.column_begin; j < tile.column_end; ++j, out += tile.lanes)
    convert_run(row + (taps.first[j] - origin) * tile.lanes, tile.lanes, out);
}

/// out (= or +=) the sums of each `block` pixels of the row.
template <class Acc>
void add_column_blocks(const Acc *row, const Tile &tile, int64_t block, bool is_first, Acc *out) {
  for (int64_t j = 0; j < tile.columns(); ++j)
    for (int64_t lane = 0; lane < tile.lanes; ++lane) {
      const Acc *pixels = row + j * block * tile.lanes + lane;
      Acc sum = pixels[0];
      for (int64_t pixel = 1; pixel < block; ++pixel)
        sum = sum + pixels[pixel * tile.lanes];
      Acc &total = out[j * tile.lanes + lane];
      total = is_first ? sum : total + sum;
    }
}

/// Row `i` of the means over blocks of block_h x block_w pixels.
template <class Acc>
void average_blocks(const Source<Acc> &source, const Tile &tile, int64_t i, Acc *scratch,
                    Acc *out) {
  for (int64_t h = 0; h < source.block_h; ++h) {
    const int64_t row = i * source.block_h + h;
    move_rows_of_any<Load>(source.maps, tile, row, row + 1, tile.column_begin * source.block_w,
                           tile.columns() * source.block_w, scratch);
    add_column_blocks(scratch, tile, source.block_w, h == 0, out);
  }
  const Acc count = static_cast<Acc>(source.block_h * source.block_w);
  for (int64_t j = 0; j < tile.columns() * tile.lanes; ++j)
    out[j] = out[j] / count;
}
