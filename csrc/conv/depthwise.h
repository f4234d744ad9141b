// The gradients of a depthwise convolution, in channels_last: lanes run over channels.

/// The taps that reach one position of the input along an axis: tap first + t * stride reads the
/// result's gradient at place - t, for t in [begin, end).
struct TapRange {
  int64_t first, place, count, size, begin = 0, end = 0;

  REVBIFPN_INLINE TapRange(int64_t padded, int64_t kernel_size, int64_t stride, int64_t grad_size)
      : first(padded % stride), place(padded / stride),
        count(std::max<int64_t>(0, (kernel_size - first + stride - 1) / stride)), size(grad_size) {
    stay_inside();
  }

  /// Advances to the position of the input `stride` further on, which the same taps reach.
  REVBIFPN_INLINE void advance() {
    ++place;
    stay_inside();
  }

  REVBIFPN_INLINE void stay_inside() {
    begin = std::max<int64_t>(0, place - size + 1);
    end = std::min(count, place + 1);
  }
};

/// One row of the input's gradient, for a block of channels.
template <class T>
REVBIFPN_INLINE void depthwise_input_row(const DepthwiseInputJob<accumulator_t<T>> &job, int64_t n,
                                         const accumulator_t<T> *weights, int64_t channel,
                                         int64_t row, int64_t lanes) {
  const int64_t size = job.kernel_size, stride = job.stride;
  const int64_t tap_step = stride * job.channels, tap_row_step = tap_step * size;
  const TapRange rows(row + job.padding, size, stride, job.grad.height);
  for (int64_t phase = 0; phase < std::min(stride, job.result.width); ++phase) {
    TapRange columns(phase + job.padding, size, stride, job.grad.width);
    const accumulator_t<T> *taps =
        weights + (rows.first * size + columns.first) * job.channels + channel;
    for (int64_t column = phase; column < job.result.width; column += stride) {
      vector_of<accumulator_t<T>> sum = {};
      for (int64_t t = rows.begin; t < rows.end; ++t) {
        const T *grad = job.grad.template at<const T>(n, channel, rows.place - t, columns.place);
        const accumulator_t<T> *tap = taps + t * tap_row_step;
        for (int64_t u = columns.begin; u < columns.end; ++u)
          sum = multiply_add(load_lanes(grad - u * job.grad.stride_w, lanes),
                             load_lanes(tap + u * tap_step, lanes), sum);
      }
      store_lanes(sum, job.result.template at<T>(n, channel, row, column), lanes);
      columns.advance();
    }
  }
}

template <class T>
void depthwise_input_units(const DepthwiseInputJob<accumulator_t<T>> &job, int64_t begin,
                           int64_t end, accumulator_t<T> *weights) {
  constexpr int64_t ALL = WIDTH<accumulator_t<T>>;
  const int64_t lanes = std::min(ALL, job.channels);
  const T *given = static_cast<const T *>(job.weights);
  for (int64_t c = 0; c < job.channels; ++c)
    for (int64_t tap = 0; tap < job.taps(); ++tap)
      weights[tap * job.channels + c] = widen(given[c * job.taps() + tap]);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / job.result.height, row = unit % job.result.height;
    for (int64_t first = 0; first < job.channels; first += ALL) {
      // The last register reaches back into the one before it, whose results it repeats.
      const int64_t channel = std::min(first, job.channels - lanes);
      if (lanes == ALL)
        depthwise_input_row<T>(job, n, weights, channel, row, ALL);
      else
        depthwise_input_row<T>(job, n, weights, channel, row, lanes);
    }
  }
}

constexpr int MOST_TAPS = 8; // their sums fit the registers beside the loaded values

/// sums[t] += over a row: grad[column] * x[column * stride + shift + t], where that is inside.
template <int TAPS, class T, class Vector>
REVBIFPN_INLINE void add_row(const DepthwiseWeightJob<accumulator_t<T>> &job, const T *x,
                             const T *grad, int64_t shift, int64_t lanes, Vector *sums) {
  Vector row[TAPS] = {};
  for (int64_t column = 0; column < job.grad.width; ++column) {
    const Vector gradient = load_lanes(grad + column * job.grad.stride_w, lanes);
    const int64_t first = column * job.stride + shift;
    if (first >= 0 && first + TAPS <= job.x.width) {
#pragma GCC unroll 8
      for (int t = 0; t < TAPS; ++t)
        row[t] =
            multiply_add(gradient, load_lanes(x + (first + t) * job.x.stride_w, lanes), row[t]);
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < TAPS; ++t)
        if (first + t >= 0 && first + t < job.x.width)
          row[t] =
              multiply_add(gradient, load_lanes(x + (first + t) * job.x.stride_w, lanes), row[t]);
    }
  }
  // Row by row, so that an error grows with the rows and columns, not with the pixels.
  for (int t = 0; t < TAPS; ++t)
    sums[t] += row[t];
}

/// The taps [first_tap, first_tap + TAPS) of one row of the kernel, for the channels of a register.
template <int TAPS, class T>
void depthwise_weight_taps(const DepthwiseWeightJob<accumulator_t<T>> &job, int64_t n,
                           int64_t first, int64_t kernel_row, int64_t first_tap) {
  using Vector = vector_of<accumulator_t<T>>;
  constexpr int64_t ALL = WIDTH<accumulator_t<T>>;
  // The last register reaches back into the one before it: whole vectors are loaded fastest.
  const int64_t lanes = std::min(ALL, job.channels);
  const int64_t channel = std::min(first, job.channels - lanes);
  Vector sums[TAPS] = {};
  for (int64_t row = 0; row < job.grad.height; ++row) {
    const int64_t x_row = row * job.stride + kernel_row - job.padding;
    if (x_row < 0 || x_row >= job.x.height)
      continue;
    const T *x = job.x.template at<const T>(n, channel, x_row, 0);
    const T *grad = job.grad.template at<const T>(n, channel, row, 0);
    const int64_t shift = first_tap - job.padding;
    if (lanes == ALL)
      add_row<TAPS>(job, x, grad, shift, ALL, sums);
    else
      add_row<TAPS>(job, x, grad, shift, lanes, sums);
  }
  for (int64_t lane = first - channel; lane < lanes; ++lane)
    for (int t = 0; t < TAPS; ++t)
      job.sum(n, channel + lane, kernel_row, first_tap + t) = sums[t][lane];
}

template <class T>
void depthwise_weight_units(const DepthwiseWeightJob<accumulator_t<T>> &job, int64_t begin,
                            int64_t end, accumulator_t<T> *) {
  const int64_t blocks = job.blocks();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t kernel_row = unit % job.kernel_size, block = unit / job.kernel_size % blocks;
    const int64_t n = unit / (job.kernel_size * blocks);
    const int64_t end = std::min((block + 1) * LANES, job.channels);
    for (int64_t c = block * LANES; c < end; c += WIDTH<accumulator_t<T>>)
      for (int64_t tap = 0; tap < job.kernel_size; tap += MOST_TAPS)
        with_constant<1, 2, 3, 4, 5, 6, 7, MOST_TAPS>(
            std::min<int64_t>(MOST_TAPS, job.kernel_size - tap),
            [&]<int TAPS>() { depthwise_weight_taps<TAPS, T>(job, n, c, kernel_row, tap); });
  }
}
