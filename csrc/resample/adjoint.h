// result_k = scale_k * transpose(R_k)(grad). Grad's rows are read once, in order, into a ring; a
// row of a result is made as soon as all rows it gathers from are there: vertical sums first, plain
// loops over rows that lie in the caches, then horizontal sums of that one row. The terms are added
// in order.

/// Pixels [begin, end) of a result by the table.
template <class Acc>
void gather_by_table(const Gather<Acc> &columns, const Acc *row, int64_t lanes, int64_t begin,
                     int64_t end, Acc *out) {
  for (int64_t q = begin; q < end; ++q) {
    const Acc *weights = columns.weights_of(q);
    const int64_t first = columns.begin[q], terms = columns.terms(q);
    if (lanes > 1) {
      sum_weighted_rows(out + q * lanes, Rows<const Acc>{row, lanes}, first, weights, terms, lanes);
      continue;
    }
    Acc sum = 0;
    for (int64_t term = 0; term < terms; ++term)
      sum = multiply_add(weights[term], row[first + term], sum);
    out[q] = sum;
  }
}

/// Away from the borders each pixel gathers 2 * FACTOR columns with the same weights.
template <int FACTOR, class Acc>
void gather_between(const Acc *weights, const Acc *row, int64_t pixels, Acc *out) {
  Acc weight[2 * FACTOR];
  std::copy_n(weights, 2 * FACTOR, weight);
  const Acc *next = row + FACTOR;
  const int64_t count = whole_vectors<Acc>(pixels);
  REVBIFPN_INDEPENDENT
  for (int64_t q = 0; q < count; ++q) {
    Acc sum = 0;
    for (int phase = 0; phase < FACTOR; ++phase)
      sum = multiply_add(weight[phase], row[q * FACTOR + phase], sum);
    for (int phase = 0; phase < FACTOR; ++phase)
      sum = multiply_add(weight[FACTOR + phase], next[q * FACTOR + phase], sum);
    out[q] = sum;
  }
}

template <int FACTOR, class Acc>
void gather_plane(const Result<Acc> &result, const Acc *row, Acc *out) {
  const int64_t width = result.maps.width;
  if (width < 3)
    return gather_by_table(result.columns, row, 1, 0, width, out);
  gather_between<FACTOR>(result.columns.weights_of(1), row + FACTOR / 2, width - 2, out + 1);
  gather_by_table(result.columns, row, 1, 0, 1, out);
  gather_by_table(result.columns, row, 1, width - 1, width, out);
}

template <class Acc>
void gather_columns(const Result<Acc> &result, const Tile &tile, const Acc *row, Acc *out) {
  if (result.maps.width == tile.columns()) {
    std::copy_n(row, tile.columns() * tile.lanes, out);
    return;
  }
  const bool is_done =
      tile.lanes == 1 && with_constant<2, 4, 8>(result.enlarge_w, [&]<int FACTOR>() {
        gather_plane<FACTOR>(result, row, out);
      });
  if (!is_done)
    gather_by_table(result.columns, row, tile.lanes, 0, result.maps.width, out);
}

template <class T> class TileGatherer {
  using Acc = accumulator_t<T>;

public:
  TileGatherer(const AdjointJob<Acc> &job, Acc *workspace) : job(job) {
    ring = workspace;
    gathered = ring + job.ring_size;
    finished = gathered + job.run_size;
  }

  /// Does rows [chunk, chunk + 1) / row_chunks of every result, for the planes of `tile`. A run of
  /// rows goes through each step together: values that were written just now are slow to read.
  void gather(Tile tile, int64_t chunk) {
    int64_t row_end = 0;
    first_row = job.grad.height;
    for (size_t k = 0; k < job.results.size(); ++k) {
      const Result<Acc> &result = job.results[k];
      const int64_t begin = chunk * result.maps.height / job.row_chunks;
      const int64_t end = (chunk + 1) * result.maps.height / job.row_chunks;
      progress[k] = {begin, begin, end};
      if (begin == end)
        continue;
      first_row = std::min<int64_t>(first_row, result.rows.begin[begin]);
      row_end = std::max(row_end, result.rows.end(end - 1));
    }
    tile.column_end = job.grad.width;
    const int64_t size = job.grad.width * tile.lanes;
    for (int64_t row = first_row; row < row_end; row += job.run_rows) {
      const int64_t end = std::min(row + job.run_rows, row_end);
      if (!is_read_in_place(tile))
        move_rows<Load, T>(job.grad, tile, row, end, 0, job.grad.width,
                           Rows<Acc>{ring, size, job.ring_rows - 1}[row - first_row]);
      for (int64_t next = end; next < end + job.run_rows; ++next)
        prefetch_row<T>(job.grad, tile, next, 0, job.grad.width);
      for (size_t k = 0; k < job.results.size(); ++k)
        finish_rows(k, tile, end);
    }
  }

private:
  /// Rows [stored, next) of a result are finished but not stored.
  struct Progress {
    int64_t stored, next, end;
  };

  /// Whether grad's rows are used without a copy: not if the last elements of each would be
  /// converted one by one, nor in half precision, which is better converted once.
  bool is_read_in_place(const Tile &tile) const {
    const int64_t size = job.grad.width * tile.lanes;
    return !std::is_same_v<T, Half> && has_dense_rows(job.grad, tile) &&
           (std::is_same_v<T, Acc> || size == whole_vectors<Acc>(size));
  }

  /// Computes the rows of result k that need only grad's rows before `loaded`.
  void finish_rows(size_t k, const Tile &tile, int64_t loaded) {
    const Result<Acc> &result = job.results[k];
    Progress &done = progress[k];
    const int64_t row_size = result.maps.width * tile.lanes;
    const int64_t run = std::max<int64_t>(1, RUN_SIZE / row_size);
    while (done.next < done.end && result.rows.end(done.next) <= loaded) {
      const int64_t most = std::min({done.stored + run, done.next + job.run_rows, done.end});
      int64_t end = done.next + 1;
      while (end < most && result.rows.end(end) <= loaded)
        ++end;
      Acc *out = finished + k * job.finished_size + (done.next - done.stored) * row_size;
      gather_rows(result, tile, done.next, end, out);
      done.next = end;
      if (end == done.stored + run || end == done.end)
        store(result, tile, k, done);
    }
  }

  /// Rows [begin, end) of a result, one after the other.
  void gather_rows(const Result<Acc> &result, const Tile &tile, int64_t begin, int64_t end,
                   Acc *out) {
    const int64_t size = job.grad.width * tile.lanes;
    if (is_read_in_place(tile)) {
      const Rows<const T> rows{job.grad.template at<const T>(tile.n, tile.c, first_row, 0),
                               job.grad.stride_h};
      sum_rows(result, rows, begin, end, size, size);
    } else {
      const Rows<const Acc> rows{ring, size, job.ring_rows - 1};
      sum_rows(result, rows, begin, end, size, whole_vectors<Acc>(size));
    }
    for (int64_t r = begin; r < end; ++r)
      gather_columns(result, tile, gathered + (r - begin) * size,
                     out + (r - begin) * result.maps.width * tile.lanes);
  }

  /// The vertical sums of rows [begin, end) of a result, `count` of `size` elements or more of
  /// each.
  template <class Element>
  void sum_rows(const Result<Acc> &result, const Rows<const Element> &rows, int64_t begin,
                int64_t end, int64_t size, int64_t count) {
    for (int64_t r = begin; r < end; ++r)
      sum_weighted_rows(gathered + (r - begin) * size, rows, result.rows.begin[r] - first_row,
                        result.rows.weights_of(r), result.rows.terms(r), count);
  }

  void store(const Result<Acc> &result, const Tile &tile, size_t k, Progress &done) {
    Acc *values = finished + k * job.finished_size;
    const int64_t width = result.maps.width;
    const int64_t count = (done.next - done.stored) * width * tile.lanes;
    for (int64_t i = 0; i < count; ++i)
      values[i] = result.scale * values[i];
    move_rows_of_any<Store>(result.maps, tile, done.stored, done.next, 0, width, values);
    done.stored = done.next;
  }

  const AdjointJob<Acc> &job;
  Acc *ring, *gathered, *finished;
  int64_t first_row; // of grad, that the tile reads; rows in the ring are counted from it
  Progress progress[MAX_SOURCES];
};

template <class T>
void adjoint_units(const AdjointJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                   accumulator_t<T> *workspace) {
  TileGatherer<T> gatherer(job, workspace);
  for (int64_t unit = begin; unit < end; ++unit)
    gatherer.gather(tile_of_group(job.groups, unit / job.row_chunks), unit % job.row_chunks);
}
