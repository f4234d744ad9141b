// y = x + alpha * sum_k R_k(s_k). Each source row is resampled horizontally once into a row of the
// strip, which serves all output rows that need it; plain loops over the strip do everything else.
//
// The order of operations is the same for every layout, strip and thread count: horizontal blend,
// vertical blend, sum over the sources in order, alpha, lattice, x.

/// The vertical blend of one bilinear source at one output row.
template <class Acc> struct Blend {
  const Acc *first, *second;
  Acc weight_first, weight_second;

  Acc at(int64_t i) const { return weight_first * first[i] + weight_second * second[i]; }
};

template <class Acc> struct Update {
  Acc alpha, snap;
};

/// y = x + the update that the sums of the sources make.
template <class T, bool SNAPS>
void update_elements(const T *x, T *y, const accumulator_t<T> *sums, int64_t count,
                     Update<accumulator_t<T>> update) {
  REVBIFPN_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    accumulator_t<T> change = update.alpha * sums[i];
    if (SNAPS)
      change = snap_to_lattice(change, update.snap);
    y[i] = narrow<T>(widen(x[i]) + change);
  }
}

template <class T> class StripAdder {
  using Acc = accumulator_t<T>;

public:
  StripAdder(const AddJob<Acc> &job, Acc *workspace)
      : job(job), sources(static_cast<int>(job.sources.size())), resampled(workspace),
        sums(resampled + 2 * sources * job.strip_size), staged(sums + job.sums_size),
        scratch(staged + job.sums_size), update{job.alpha, job.snap} {}

  void add(const Tile &tile) {
    for (int k = 0; k < sources; ++k)
      cached[k][0].row = cached[k][1].row = -1;
    const int64_t size = tile.columns() * tile.lanes;
    const int64_t run = std::min(rows_of_run(job.x, tile), rows_of_run(job.y, tile));
    for (int64_t row = tile.row_begin; row < tile.row_end; row += run) {
      const int64_t rows = std::min(run, tile.row_end - row);
      for (int64_t i = 0; i < rows; ++i)
        sum_sources(tile, row + i, sums + i * size);
      update_rows(tile, row, rows * tile.columns());
    }
  }

private:
  struct CachedRow {
    int64_t row;
    const Acc *data;
  };

  /// One row of the sum of the resampled sources; up to four bilinear ones in one loop.
  void sum_sources(const Tile &tile, int64_t row, Acc *out) {
    for (int k = 0; k < sources;) {
      int bilinear = 0;
      while (bilinear < 4 && k + bilinear < sources && job.sources[k + bilinear].kind == Kind::bilinear)
        ++bilinear;
      if (bilinear == 0)
        add_row(tile, row, k, out);
      else if (k == 0)
        add_bilinear_rows<true>(tile, row, k, bilinear, out);
      else
        add_bilinear_rows<false>(tile, row, k, bilinear, out);
      k += std::max(bilinear, 1);
    }
  }

  template <bool IS_FIRST>
  void add_bilinear_rows(const Tile &tile, int64_t row, int k, int count, Acc *out) {
    switch (count) {
    case 1:
      return add_blends<1, IS_FIRST>(tile, row, k, out);
    case 2:
      return add_blends<2, IS_FIRST>(tile, row, k, out);
    case 3:
      return add_blends<3, IS_FIRST>(tile, row, k, out);
    default:
      return add_blends<4, IS_FIRST>(tile, row, k, out);
    }
  }

  template <int SOURCES, bool IS_FIRST>
  void add_blends(const Tile &tile, int64_t row, int k, Acc *out) {
    Blend<Acc> blends[SOURCES];
    for (int i = 0; i < SOURCES; ++i) {
      const Taps<Acc> &rows = job.sources[k + i].rows;
      blends[i] = {resampled_row(k + i, tile, rows.first[row]),
                   resampled_row(k + i, tile, rows.second[row]), rows.weight_first[row],
                   rows.weight_second[row]};
    }
    const int64_t count = whole_vectors(tile.columns() * tile.lanes);
    REVBIFPN_INDEPENDENT
    for (int64_t j = 0; j < count; ++j) {
      Acc sum = blends[0].at(j);
      if (!IS_FIRST)
        sum = out[j] + sum;
      for (int i = 1; i < SOURCES; ++i)
        sum = sum + blends[i].at(j);
      out[j] = sum;
    }
  }

  void add_row(const Tile &tile, int64_t row, int k, Acc *out) {
    const Acc *values = resampled_row(k, tile, job.sources[k].rows.first[row]);
    const int64_t count = whole_vectors(tile.columns() * tile.lanes);
    REVBIFPN_INDEPENDENT
    for (int64_t j = 0; j < count; ++j)
      out[j] = k == 0 ? values[j] : out[j] + values[j];
  }

  /// Row `row` of source k, resampled horizontally; neighbours are kept in two alternating places.
  const Acc *resampled_row(int k, const Tile &tile, int64_t row) {
    CachedRow &place = cached[k][row & 1];
    if (place.row != row) {
      Acc *out = resampled + (2 * k + (row & 1)) * job.strip_size;
      resample_row(job.sources[k], tile, row, out);
      place = {row, out};
    }
    return place.data;
  }

  void resample_row(const Source<Acc> &source, const Tile &tile, int64_t row, Acc *out) {
    if (source.kind == Kind::identity)
      return load_row(source.maps, tile, row, tile.column_begin, tile.columns(), out);
    if (source.kind == Kind::area)
      return average_blocks(source, tile, row, scratch, out);
    const bool is_bilinear = source.kind == Kind::bilinear;
    const int64_t begin = source.columns.first[tile.column_begin];
    const int64_t last =
        (is_bilinear ? source.columns.second : source.columns.first)[tile.column_end - 1];
    load_row(source.maps, tile, row, begin, last - begin + 1, scratch);
    if (is_bilinear)
      enlarge_columns(source, tile, scratch, begin, out);
    else
      pick_columns(source.columns, tile, scratch, begin, out);
  }

  /// y = x + update for `pixels` pixels from `row` on, whose sums lie ready.
  void update_rows(const Tile &tile, int64_t row, int64_t pixels) {
    const int64_t column = tile.column_begin;
    const T *x = job.x.template at<const T>(tile.n, tile.c, row, column);
    T *y = job.y.template at<T>(tile.n, tile.c, row, column);
    if (std::is_same_v<T, Half> || !has_adjacent_lanes(job.x, tile) ||
        !has_adjacent_lanes(job.y, tile)) {
      load_row_as<T>(job.x, tile, row, column, pixels, staged);
      add_update(staged, staged, sums, pixels * tile.lanes);
      store_row_as<T>(job.y, tile, row, column, pixels, staged);
    } else if (has_dense_rows(job.x, tile) && has_dense_rows(job.y, tile)) {
      add_update(x, y, sums, pixels * tile.lanes);
    } else {
      for (int64_t j = 0; j < pixels; ++j)
        add_update(x + j * job.x.stride_w, y + j * job.y.stride_w, sums + j * tile.lanes, tile.lanes);
    }
  }

  template <class Element>
  void add_update(const Element *x, Element *y, const Acc *sum, int64_t count) const {
    if (update.snap > 0)
      update_elements<Element, true>(x, y, sum, count, update);
    else
      update_elements<Element, false>(x, y, sum, count, update);
  }

  const AddJob<Acc> &job;
  int sources;
  Acc *resampled, *sums, *staged, *scratch;
  Update<Acc> update;
  CachedRow cached[MAX_SOURCES][2];
};

template <class T>
void add_units(const AddJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
               accumulator_t<T> *workspace) {
  StripAdder<T> adder(job, workspace);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t strip = unit % job.strips;
    const int64_t chunk = unit / job.strips % job.row_chunks;
    Tile tile = tile_of_group(job.lanes, unit / (job.strips * job.row_chunks));
    tile.row_begin = chunk * job.chunk_rows;
    tile.row_end = std::min(tile.row_begin + job.chunk_rows, job.y.height);
    tile.column_begin = strip * job.strip_columns;
    tile.column_end = std::min(tile.column_begin + job.strip_columns, job.y.width);
    adder.add(tile);
  }
}
