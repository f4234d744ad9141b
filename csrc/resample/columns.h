// The horizontal half of a resampling: dense rows of a source to dense rows of a strip.

/// Rows [begin, end) of a source, one after the other, each from pixel `origin` on.
template <class Acc> struct SourceRows {
  const Acc *data;
  int64_t stride, begin, end, origin;

  const Acc *operator[](int64_t i) const { return data + (i - begin) * stride; }
};

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

/// The weights of the FACTOR outputs between the centres of two source pixels, the same everywhere,
/// repeated to whole vectors.
template <int FACTOR, class Acc> struct Blend {
  static constexpr int VECTORS = std::max(FACTOR / WIDTH<Acc>, 1);
  vector_of<Acc> first[VECTORS], second[VECTORS];

  Blend() = default;
  explicit Blend(const Taps<Acc> &taps) {
    for (int lane = 0; lane < VECTORS * WIDTH<Acc>; ++lane) {
      const int output = FACTOR / 2 + lane % FACTOR;
      first[lane / WIDTH<Acc>][lane % WIDTH<Acc>] = taps.weight_first[output];
      second[lane / WIDTH<Acc>][lane % WIDTH<Acc>] = taps.weight_second[output];
    }
  }

  /// The outputs after each of `pixels` pixels.
  REVBIFPN_INLINE void enlarge(const Acc *row, int64_t pixels, Acc *out) const {
    const Acc *end = row + pixels;
    for (; row < end; row += std::max(WIDTH<Acc> / FACTOR, 1)) {
      const auto before = repeat_values<FACTOR>(row), after = repeat_values<FACTOR>(row + 1);
      REVBIFPN_UNROLLED(i, VECTORS) {
        store_vector(multiply_add(second[i], after, first[i] * before), out);
        out += WIDTH<Acc>;
      }
    }
  }
};

/// Rows of one plane enlarged by a power of two: constant weights, and the table before the centre
/// of the first pixel and after that of the last.
template <int FACTOR, class Acc>
void enlarge_planes(const Source<Acc> &source, const Tile &tile, const SourceRows<Acc> &from,
                    const Rows<Acc> &to) {
  const int64_t half = FACTOR / 2, begin = tile.column_begin, end = tile.column_end;
  const int64_t first = std::max<int64_t>(0, (begin - half + FACTOR - 1) / FACTOR);
  const int64_t last = std::max(first, std::min((end - half) / FACTOR, source.maps.width - 1));
  const bool has_inner = last > first;
  const int64_t inner_begin = has_inner ? half + first * FACTOR : end;
  const int64_t inner_end = has_inner ? half + last * FACTOR : end;
  // A source of one pixel has no outputs between centres, and no weights for them.
  const Blend<FACTOR, Acc> blend =
      has_inner ? Blend<FACTOR, Acc>(source.columns) : Blend<FACTOR, Acc>();
  for (int64_t r = from.begin; r < from.end; ++r) {
    const Acc *row = from[r];
    Acc *out = to[r];
    if (has_inner)
      blend.enlarge(row + (first - from.origin), last - first, out + (inner_begin - begin));
    enlarge_by_table(source.columns, row, from.origin, 1, begin, inner_begin, out);
    enlarge_by_table(source.columns, row, from.origin, 1, inner_end, end,
                     out + (inner_end - begin));
  }
}

template <class Acc>
void enlarge_columns(const Source<Acc> &source, const Tile &tile, const SourceRows<Acc> &from,
                     const Rows<Acc> &to) {
  const bool is_done =
      tile.lanes == 1 && with_constant<2, 4, 8>(source.enlarge_w, [&]<int FACTOR>() {
        enlarge_planes<FACTOR>(source, tile, from, to);
      });
  for (int64_t r = from.begin; !is_done && r < from.end; ++r)
    enlarge_by_table(source.columns, from[r], from.origin, tile.lanes, tile.column_begin,
                     tile.column_end, to[r]);
}

template <class Acc>
void pick_columns(const Taps<Acc> &taps, const Tile &tile, const SourceRows<Acc> &from,
                  const Rows<Acc> &to) {
  for (int64_t r = from.begin; r < from.end; ++r) {
    const Acc *row = from[r];
    Acc *out = to[r];
    for (int64_t j = tile.column_begin; j < tile.column_end; ++j, out += tile.lanes)
      if (const Acc *pixel = row + (taps.first[j] - from.origin) * tile.lanes; tile.lanes == 1)
        *out = *pixel;
      else
        convert_run(pixel, tile.lanes, out);
  }
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
