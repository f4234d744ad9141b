// y = x + alpha * sum_k R_k(s_k). Each source row is resampled horizontally once into a row of the
// strip, which serves all output rows that need it. Then one loop over an output row does the rest.
//
// The order of operations is the same for every layout, strip and thread count: horizontal blend,
// rows times alpha and their vertical weights, summed in the order of the sources, lattice, x.

/// A resampled row, and what it is multiplied with in one output row.
template <class Acc> struct Term {
  const Acc *row;
  Acc weight;
};

// Each source has one term, or two if it is bilinear.
constexpr int MAX_TERMS = 2 * MAX_SOURCES;

/// The sum of COUNT terms, or of `used` if COUNT is 0.
template <int COUNT, class Acc> struct TermSum {
  using Vector = vector_of<Acc>;
  static constexpr int MOST = COUNT > 0 ? COUNT : MAX_TERMS;

  REVBIFPN_INLINE TermSum(const Term<Acc> *terms, int used) : count(COUNT > 0 ? COUNT : used) {
    for (int term = 0; term < count; ++term) {
      const Acc *row = terms[term].row;
      asm("" : "+r"(row)); // else GCC loads pairs as vectors, which wait for scalar stores
      rows[term] = row;
      weights[term] = splat<Vector>(terms[term].weight);
    }
  }

  /// A vector of the sum, from element i on.
  REVBIFPN_INLINE Vector at(int64_t i) const {
    Vector sum = weights[0] * load_vector(rows[0] + i);
    REVBIFPN_UNROLLED(term, (COUNT > 0 ? COUNT : count) - 1)
    sum = multiply_add(weights[term + 1], load_vector(rows[term + 1] + i), sum);
    return sum;
  }

  int count;
  const Acc *rows[MOST];
  Vector weights[MOST];
};

/// out = the sum of the terms, in whole vectors. What lies from `next` on is prefetched.
template <int COUNT, class T>
void sum_terms(const Term<accumulator_t<T>> *terms, int used, accumulator_t<T> *out, int64_t count,
               const T *next) {
  using Acc = accumulator_t<T>;
  const TermSum<COUNT, Acc> sum(terms, used);
  for (int64_t i = 0; i < count; i += WIDTH<Acc>) {
    __builtin_prefetch(next + i);
    store_vector(sum.at(i), out + i);
  }
}

/// y = x + the sum of the terms from `offset` on, on the lattice if it SNAPS. y may be x: the last
/// vector, which may overlap the one before it, is read before anything is written. What lies
/// `ahead` elements after x is prefetched.
template <int COUNT, bool SNAPS, class T>
void update_elements(const Term<accumulator_t<T>> *terms, int used, int64_t offset,
                     accumulator_t<T> snap, const T *x, T *y, int64_t count, int64_t ahead) {
  using Acc = accumulator_t<T>;
  using Vector = vector_of<Acc>;
  constexpr int64_t STEP = WIDTH<Acc>;
  const TermSum<COUNT, Acc> sum(terms, used);
  const auto updated = [&](Vector old, int64_t i) __attribute__((always_inline)) {
    const Vector change = sum.at(offset + i);
    return old + (SNAPS ? snap_to_lattice(change, splat<Vector>(snap)) : change);
  };
  if (count < STEP)
    return store_first(updated(load_first(x, count), 0), y, count);
  const int64_t last = count - STEP;
  const Vector last_of_x = load_vector(x + last);
  int64_t i = 0;
  for (; i + 2 * STEP <= last; i += 2 * STEP) {
    const Vector first = updated(load_vector(x + i), i);
    __builtin_prefetch(x + i + ahead);
    store_two_vectors(first, updated(load_vector(x + i + STEP), i + STEP), y + i);
  }
  for (; i < last; i += STEP)
    store_vector(updated(load_vector(x + i), i), y + i);
  store_vector(updated(last_of_x, last), y + last);
}

/// The loops of an output row; those of 1, 2, 4, 6 and 8 terms are compiled for that number.
template <class T> struct RowLoops {
  using Acc = accumulator_t<T>;
  void (*sum)(const Term<Acc> *, int, Acc *, int64_t, const T *);
  void (*update)(const Term<Acc> *, int, int64_t, Acc, const T *, T *, int64_t, int64_t);

  RowLoops(int terms, bool snaps) {
    set<0>(snaps);
    with_constant<1, 2, 4, 6, 8>(terms, [&]<int COUNT>() { set<COUNT>(snaps); });
  }

  template <int COUNT> void set(bool snaps) {
    sum = sum_terms<COUNT, T>;
    update = snaps ? update_elements<COUNT, true, T> : update_elements<COUNT, false, T>;
  }
};

/// values = scale * values + shift; the product is rounded before the sum, as in PyTorch. Each
/// pixel has `lanes` scales and shifts.
template <class Acc>
void scale_pixels(const Acc *scale, const Acc *shift, int64_t lanes, int64_t pixels, Acc *values) {
  const Acc *end = values + pixels * lanes;
  if (lanes == 1) {
    const auto factor = splat<vector_of<Acc>>(*scale), term = splat<vector_of<Acc>>(*shift);
    for (; values < end; values += WIDTH<Acc>)
      store_vector(factor * load_vector(values) + term, values);
    return;
  }
  for (; values < end; values += lanes)
    for (int64_t lane = 0; lane < lanes; lane += WIDTH<Acc>) {
      const int64_t count = std::min<int64_t>(lanes - lane, WIDTH<Acc>);
      const auto scaled = load_lanes(scale + lane, count) * load_lanes(values + lane, count) +
                          load_lanes(shift + lane, count);
      store_lanes(scaled, values + lane, count);
    }
}

// Rows of at most this many elements are added several at once.
constexpr int64_t NARROW = 64;

template <class T> class StripAdder {
  using Acc = accumulator_t<T>;

public:
  StripAdder(const AddJob<Acc> &job, Acc *workspace)
      : job(job), sources(static_cast<int>(job.sources.size())), terms_used(count_terms(job)),
        loops(terms_used, job.snap > 0), staged_loops(terms_used, job.snap > 0),
        last_loops(1, job.snap > 0) {
    // Rows begin at cache lines, so that no vector lies in two.
    staged = workspace + (-reinterpret_cast<uintptr_t>(workspace) % 64) / sizeof(Acc);
    scratch = staged + job.staged_size;
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
      next_row[k] = job.sources[k].first_of(job.sources[k].rows, tile.row_begin);
    for (int64_t row = tile.row_begin; row < tile.row_end; row += job.run_rows) {
      const int64_t row_end = std::min(row + job.run_rows, tile.row_end);
      for (int k = 0; k < sources; ++k)
        resample_rows(k, tile, row_end);
      if (is_narrow(tile))
        update_run(tile, row, row_end);
      else
        for (int64_t i = row; i < row_end; ++i)
          update_row(tile, i);
    }
  }

private:
  static int count_terms(const AddJob<Acc> &job) {
    int terms = 0;
    for (const Source<Acc> &source : job.sources)
      terms += source.kind == Kind::bilinear ? 2 : 1;
    return terms;
  }

  /// Whether a row is so short that its last, partial vector matters; if so, and the rows of the
  /// planes lie one after the other, x is added to a run of them at once.
  bool is_narrow(const Tile &tile) const {
    return job.strips == 1 && tile.columns() * tile.lanes <= NARROW &&
           has_dense_planes(job.x, tile, tile.columns()) &&
           has_dense_planes(job.y, tile, tile.columns());
  }

  /// Resamples the rows of source k that target rows before `row_end` need, horizontally.
  void resample_rows(int k, const Tile &tile, int64_t row_end) {
    const Source<Acc> &source = job.sources[k];
    const Taps<Acc> &columns = source.columns;
    const bool is_bilinear = source.kind == Kind::bilinear;
    const int64_t begin = next_row[k], end = source.last_of(source.rows, row_end - 1) + 1;
    if (end <= begin)
      return;
    next_row[k] = end;
    const int64_t column = source.first_of(columns, tile.column_begin);
    const int64_t pixels = source.last_of(columns, tile.column_end - 1) + 1 - column;
    if (source.is_enlarged()) {
      move_rows_of_any<Load>(source.maps, tile, begin, end, column, pixels, scratch);
      scale(source, tile, (end - begin) * pixels, scratch);
      const SourceRows<Acc> rows = {scratch, pixels * tile.lanes, begin, end, column};
      if (is_bilinear)
        enlarge_columns(source, tile, rows, resampled[k]);
      else
        pick_columns(columns, tile, rows, resampled[k]);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      Acc *out = resampled[k][row];
      if (source.kind == Kind::area)
        average_blocks(source, tile, row, scratch, out);
      else
        move_rows_of_any<Load>(source.maps, tile, row, row + 1, column, pixels, out);
      scale(source, tile, tile.columns(), out);
    }
  }

  void scale(const Source<Acc> &source, const Tile &tile, int64_t pixels, Acc *values) const {
    if (source.scale.values != nullptr)
      scale_pixels(source.scale.of(tile.n, tile.c), source.shift.of(tile.n, tile.c), tile.lanes,
                   pixels, values);
  }

  void find_terms(int64_t row) {
    Term<Acc> *term = terms;
    for (int k = 0; k < sources; ++k) {
      const Source<Acc> &source = job.sources[k];
      const Taps<Acc> &rows = source.rows;
      const bool is_blended = source.kind == Kind::bilinear;
      *term++ = {resampled[k][source.first_of(rows, row)],
                 is_blended ? job.alpha * rows.weight_first[row] : job.alpha};
      if (is_blended)
        *term++ = {resampled[k][rows.second[row]], job.alpha * rows.weight_second[row]};
    }
  }

  /// y = x + the sum of the terms for the dense rows [row, row_end). Each row of sums ends in a
  /// whole vector, over which the next row is written.
  void update_run(const Tile &tile, int64_t row, int64_t row_end) {
    const int64_t size = tile.columns() * tile.lanes;
    const T *x = job.x.template at<const T>(tile.n, tile.c, row, 0);
    for (int64_t i = row; i < row_end; ++i) {
      find_terms(i);
      const int64_t done = (i - row) * size;
      loops.sum(terms, terms_used, staged + done, size, x + job.run_rows * size + done);
    }
    const Term<Acc> sums = {staged, 1};
    last_loops.update(&sums, 1, 0, job.snap, x, job.y.template at<T>(tile.n, tile.c, row, 0),
                      (row_end - row) * size, 0);
  }

  /// The same for one row of the strip, in any layout.
  void update_row(const Tile &tile, int64_t row) {
    find_terms(row);
    const int64_t columns = tile.columns(), column = tile.column_begin, size = columns * tile.lanes;
    if (!has_adjacent_lanes(job.x, tile) || !has_adjacent_lanes(job.y, tile)) {
      move_row<Load, const T>(job.x, tile, row, column, columns, staged);
      staged_loops.update(terms, terms_used, 0, job.snap, staged, staged, size, 0);
      return move_row<Store, T>(job.y, tile, row, column, columns, staged);
    }
    const bool is_dense = has_dense_rows(job.x, tile) && has_dense_rows(job.y, tile);
    const int64_t run = is_dense ? columns : 1;
    for (int64_t i = 0; i < columns; i += run)
      loops.update(terms, terms_used, i * tile.lanes, job.snap,
                   job.x.template at<const T>(tile.n, tile.c, row, column + i),
                   job.y.template at<T>(tile.n, tile.c, row, column + i), run * tile.lanes,
                   job.y.height == 1 ? size : job.run_rows * job.x.stride_h);
  }

  const AddJob<Acc> &job;
  const int sources, terms_used;
  const RowLoops<T> loops;
  const RowLoops<Acc> staged_loops; // of a row that lies in `staged`
  const RowLoops<T> last_loops;     // of sums that lie there
  Term<Acc> terms[MAX_TERMS];
  Acc *staged, *scratch;
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
