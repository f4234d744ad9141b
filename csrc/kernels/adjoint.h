// result_k = scale_k * transpose(R_k)(grad). Grad's rows are read once, in order, into a ring; a row of a
// result is made as soon as all rows it gathers from are there: vertical sums first, plain loops over
// rows that lie in the caches, then horizontal sums of that one row. The terms are added in order.

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
    Acc sum = terms == 0 ? Acc(0) : weights[0] * row[first];
    for (int64_t term = 1; term < terms; ++term)
      sum = sum + weights[term] * row[first + term];
    out[q] = sum;
  }
}

/// Away from the borders each pixel gathers 2 * FACTOR columns with the same weights.
template <int FACTOR, class Acc>
void gather_between(const Acc *weights, const Acc *row, int64_t pixels, Acc *out) {
  Acc weight[2 * FACTOR];
  std::copy_n(weights, 2 * FACTOR, weight);
  const Acc *next = row + FACTOR;
  const int64_t count = whole_vectors(pixels);
  REVBIFPN_INDEPENDENT
  for (int64_t q = 0; q < count; ++q) {
    Acc sum = weight[0] * row[q * FACTOR];
    for (int phase = 1; phase < FACTOR; ++phase)
      sum = sum + weight[phase] * row[q * FACTOR + phase];
    for (int phase = 0; phase < FACTOR; ++phase)
      sum = sum + weight[FACTOR + phase] * next[q * FACTOR + phase];
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
  switch (tile.lanes == 1 ? result.enlarge_w : 0) {
  case 2:
    return gather_plane<2>(result, row, out);
  case 4:
    return gather_plane<4>(result, row, out);
  case 8:
    return gather_plane<8>(result, row, out);
  default:
    return gather_by_table(result.columns, row, tile.lanes, 0, result.maps.width, out);
  }
}

template <class T> class TileGatherer {
  using Acc = accumulator_t<T>;

public:
  TileGatherer(const AdjointJob<Acc> &job, Acc *workspace)
      : job(job), ring{workspace, job.row_size, job.ring_rows - 1},
        gathered(workspace + job.ring_rows * job.row_size), finished(gathered + job.row_size) {}

  /// Does rows [chunk, chunk + 1) / row_chunks of every result, for the planes of `tile`.
  void gather(Tile tile, int64_t chunk) {
    int64_t row = job.grad.height, row_end = 0;
    for (size_t k = 0; k < job.results.size(); ++k) {
      const Result<Acc> &result = job.results[k];
      const int64_t begin = chunk * result.maps.height / job.row_chunks;
      const int64_t end = (chunk + 1) * result.maps.height / job.row_chunks;
      progress[k] = {begin, begin, end};
      if (begin == end)
        continue;
      row = std::min<int64_t>(row, result.rows.begin[begin]);
      row_end = std::max(row_end, result.rows.end(end - 1));
    }
    for (; row < row_end; ++row) {
      load_row_as<T>(job.grad, tile, row, 0, job.grad.width, ring[row]);
      for (size_t k = 0; k < job.results.size(); ++k)
        finish_rows(k, tile, row + 1);
    }
  }

private:
  /// Rows [stored, next) of a result are finished but not stored.
  struct Progress {
    int64_t stored, next, end;
  };

  /// Makes the rows of result k that gather from grad's rows before `loaded` only.
  void finish_rows(size_t k, Tile tile, int64_t loaded) {
    const Result<Acc> &result = job.results[k];
    const Gather<Acc> &rows = result.rows;
    Progress &done = progress[k];
    if (done.next == done.end || rows.end(done.next) > loaded)
      return;
    const int64_t size = job.grad.width * tile.lanes, width = result.maps.width;
    tile.column_end = width;
    const int64_t run = rows_of_run(result.maps, tile);
    for (; done.next < done.end && rows.end(done.next) <= loaded; ++done.next) {
      if (done.next - done.stored == run)
        store(result, tile, k, done);
      Acc *out = finished + k * job.finished_size + (done.next - done.stored) * width * tile.lanes;
      const Rows<const Acc> loaded_rows{ring.data, ring.stride, ring.mask};
      sum_weighted_rows(gathered, loaded_rows, rows.begin[done.next], rows.weights_of(done.next),
                        rows.terms(done.next), size);
      gather_columns(result, tile, gathered, out);
    }
    if (done.next == done.end)
      store(result, tile, k, done);
  }

  void store(const Result<Acc> &result, const Tile &tile, size_t k, Progress &done) {
    Acc *values = finished + k * job.finished_size;
    const int64_t pixels = (done.next - done.stored) * result.maps.width;
    for (int64_t i = 0; i < pixels * tile.lanes; ++i)
      values[i] = result.scale * values[i];
    store_row(result.maps, tile, done.stored, 0, pixels, values);
    done.stored = done.next;
  }

  const AdjointJob<Acc> &job;
  Rows<Acc> ring;
  Acc *gathered, *finished;
  Progress progress[MAX_SOURCES];
};

template <class T>
void adjoint_units(const AdjointJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                   accumulator_t<T> *workspace) {
  TileGatherer<T> gatherer(job, workspace);
  for (int64_t unit = begin; unit < end; ++unit)
    gatherer.gather(tile_of_group(job.lanes, unit / job.row_chunks), unit % job.row_chunks);
}
