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

/// y = x + alpha * the sums of the sources, on the lattice if it SNAPS.
template <class T, bool SNAPS>
void update_elements(const T *x, T *y, const accumulator_t<T> *sums, int64_t count,
                     accumulator_t<T> alpha, accumulator_t<T> snap) {
  REVBIFPN_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    accumulator_t<T> change = alpha * sums[i];
    if (SNAPS)
      change = snap_to_lattice(change, snap);
    y[i] = narrow<T>(widen(x[i]) + change);
  }
}

/// The scale and the shift of each lane; null where a source is taken as it is.
template <class Acc> struct Scaling {
  const Acc *scale, *shift;
};

/// out = scale * values + shift, plus `sum` where asked for; out may be values or sum.
template <bool ADDS, class Acc>
void scale_pixels(const Scaling<Acc> &scaling, int64_t lanes, const Acc *values, const Acc *sum,
                  int64_t pixels, Acc *out) {
  if (lanes == 1) {
    const Acc scale = *scaling.scale, shift = *scaling.shift;
    const int64_t count = whole_vectors(pixels);
    REVBIFPN_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const Acc scaled = scale * values[i] + shift;
      out[i] = ADDS ? sum[i] + scaled : scaled;
    }
    return;
  }
  for (int64_t i = 0; i < pixels * lanes; i += lanes) {
    REVBIFPN_INDEPENDENT
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const Acc scaled = scaling.scale[lane] * values[i + lane] + scaling.shift[lane];
      out[i + lane] = ADDS ? sum[i + lane] + scaled : scaled;
    }
  }
}

template <class T> class StripAdder {
  using Acc = accumulator_t<T>;

public:
  StripAdder(const AddJob<Acc> &job, Acc *workspace)
      : job(job), sources(static_cast<int>(job.sources.size())) {
    sums = workspace;
    staged = sums + job.run_size;
    scratch = staged + job.run_size;
    Acc *place = scratch + job.scratch_size;
    for (int k = 0; k < sources; ++k) {
      resampled[k] = {place, job.strip_size, job.sources[k].ring_rows - 1};
      place += job.sources[k].ring_rows * job.strip_size;
    }
  }

  /// A run of rows goes through each step together: values that were written just now are slow to
  /// read.
  void add(const Tile &tile) {
    for (int k = 0; k < sources; ++k)
      next_row[k] = job.sources[k].rows.first[tile.row_begin];
    const int64_t size = tile.columns() * tile.lanes;
    for (int64_t row = tile.row_begin; row < tile.row_end; row += job.run_rows) {
      const int64_t row_end = std::min(row + job.run_rows, tile.row_end);
      for (int64_t next = row_end; next < row_end + job.run_rows; ++next)
        prefetch_row<T>(job.x, tile, next, tile.column_begin, tile.columns());
      for (int k = 0; k < sources; ++k)
        resample_rows(k, tile, row_end);
      for (int64_t i = row; i < row_end; ++i)
        sum_sources(tile, i, sums + (i - row) * size);
      update_rows(tile, row, row_end);
    }
  }

private:
  /// One row of the sum of the resampled sources; up to four bilinear ones in one loop.
  void sum_sources(const Tile &tile, int64_t row, Acc *out) {
    for (int k = 0; k < sources;) {
      int bilinear = 0;
      while (bilinear < 4 && k + bilinear < sources &&
             job.sources[k + bilinear].kind == Kind::bilinear)
        ++bilinear;
      if (bilinear == 0)
        add_row(tile, row, k, out);
      with_constant<1, 2, 3, 4>(bilinear, [&]<int SOURCES>() {
        k == 0 ? add_blends<SOURCES, true>(tile, row, k, out)
               : add_blends<SOURCES, false>(tile, row, k, out);
      });
      k += std::max(bilinear, 1);
    }
  }

  template <int SOURCES, bool IS_FIRST>
  void add_blends(const Tile &tile, int64_t row, int k, Acc *out) {
    Blend<Acc> blends[SOURCES];
    for (int i = 0; i < SOURCES; ++i) {
      const Taps<Acc> &rows = job.sources[k + i].rows;
      blends[i] = {resampled[k + i][rows.first[row]], resampled[k + i][rows.second[row]],
                   rows.weight_first[row], rows.weight_second[row]};
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

  /// A source whose rows are not blended is scaled here, which saves a step.
  void add_row(const Tile &tile, int64_t row, int k, Acc *out) {
    const Acc *values = resampled[k][job.sources[k].rows.first[row]];
    const Scaling<Acc> scaling = scaling_of(job.sources[k], tile);
    if (scaling.scale != nullptr)
      return k == 0 ? scale_pixels<false>(scaling, tile.lanes, values, out, tile.columns(), out)
                    : scale_pixels<true>(scaling, tile.lanes, values, out, tile.columns(), out);
    const int64_t count = whole_vectors(tile.columns() * tile.lanes);
    REVBIFPN_INDEPENDENT
    for (int64_t j = 0; j < count; ++j)
      out[j] = k == 0 ? values[j] : out[j] + values[j];
  }

  Scaling<Acc> scaling_of(const Source<Acc> &source, const Tile &tile) const {
    if (source.scale == nullptr)
      return {};
    const int64_t plane = tile.n * job.groups.channels + tile.c;
    return {source.scale + plane, source.shift + plane};
  }

  /// Resamples the rows of source k that target rows before `row_end` need, horizontally.
  void resample_rows(int k, const Tile &tile, int64_t row_end) {
    const Source<Acc> &source = job.sources[k];
    const Taps<Acc> &columns = source.columns;
    const bool is_bilinear = source.kind == Kind::bilinear;
    const int64_t end = (is_bilinear ? source.rows.second : source.rows.first)[row_end - 1] + 1;
    const int64_t column = columns.first[tile.column_begin];
    const int64_t pixels =
        (is_bilinear ? columns.second : columns.first)[tile.column_end - 1] + 1 - column;
    if (source.kind == Kind::identity) {
      for (; next_row[k] < end; ++next_row[k])
        move_rows_of_any<Load>(source.maps, tile, next_row[k], next_row[k] + 1, column, pixels,
                               resampled[k][next_row[k]]);
      return;
    }
    const Acc *row = scratch;
    if (source.kind != Kind::area && next_row[k] < end)
      move_rows_of_any<Load>(source.maps, tile, next_row[k], end, column, pixels, scratch);
    const Scaling<Acc> scaling = scaling_of(source, tile);
    if (is_bilinear && scaling.scale != nullptr)
      scale_pixels<false>(scaling, tile.lanes, scratch, scratch, (end - next_row[k]) * pixels,
                          scratch);
    for (; next_row[k] < end; ++next_row[k], row += pixels * tile.lanes) {
      Acc *out = resampled[k][next_row[k]];
      if (source.kind == Kind::area)
        average_blocks(source, tile, next_row[k], scratch, out);
      else if (is_bilinear)
        enlarge_columns(source, tile, row, column, out);
      else
        pick_columns(columns, tile, row, column, out);
    }
  }

  /// y = x + update for rows whose sums lie ready.
  void update_rows(const Tile &tile, int64_t begin, int64_t end) {
    const int64_t columns = tile.columns(), column = tile.column_begin, size = columns * tile.lanes;
    if (std::is_same_v<T, Half> || !has_adjacent_lanes(job.x, tile) ||
        !has_adjacent_lanes(job.y, tile)) {
      move_rows<Load, T>(job.x, tile, begin, end, column, columns, staged);
      add_update(staged, staged, sums, (end - begin) * size);
      return move_rows<Store, T>(job.y, tile, begin, end, column, columns, staged);
    }
    const bool is_dense = has_dense_rows(job.x, tile) && has_dense_rows(job.y, tile);
    const bool is_one_run =
        has_dense_planes(job.x, tile, columns) && has_dense_planes(job.y, tile, columns);
    const int64_t run = is_one_run ? (end - begin) * size : is_dense ? size : tile.lanes;
    for (int64_t i = 0; i < (end - begin) * size; i += run) {
      const int64_t row = begin + i / size, pixel = column + i % size / tile.lanes;
      add_update(job.x.template at<const T>(tile.n, tile.c, row, pixel),
                 job.y.template at<T>(tile.n, tile.c, row, pixel), sums + i, run);
    }
  }

  template <class Element>
  void add_update(const Element *x, Element *y, const Acc *sum, int64_t count) const {
    if (job.snap > 0)
      update_elements<Element, true>(x, y, sum, count, job.alpha, job.snap);
    else
      update_elements<Element, false>(x, y, sum, count, job.alpha, job.snap);
  }

  const AddJob<Acc> &job;
  int sources;
  Acc *sums, *staged, *scratch;
  Rows<Acc> resampled[MAX_SOURCES]; // rings of the rows in use
  int64_t next_row[MAX_SOURCES];    // of a source: not yet resampled
};

template <class T>
void add_units(const AddJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
               accumulator_t<T> *workspace) {
  StripAdder<T> adder(job, workspace);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t strip = unit % job.strips;
    const int64_t chunk = unit / job.strips % job.row_chunks;
    Tile tile = tile_of_group(job.groups, unit / (job.strips * job.row_chunks));
    tile.row_begin = chunk * job.chunk_rows;
    tile.row_end = std::min(tile.row_begin + job.chunk_rows, job.y.height);
    tile.column_begin = strip * job.strip_columns;
    tile.column_end = std::min(tile.column_begin + job.strip_columns, job.y.width);
    adder.add(tile);
  }
}
