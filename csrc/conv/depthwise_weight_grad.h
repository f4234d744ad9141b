// The gradient of a depthwise convolution's weights, in channels_last: lanes run over channels.

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
        row[t] += gradient * load_lanes(x + (first + t) * job.x.stride_w, lanes);
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < TAPS; ++t)
        if (first + t >= 0 && first + t < job.x.width)
          row[t] += gradient * load_lanes(x + (first + t) * job.x.stride_w, lanes);
    }
  }
  // Row by row, so that an error grows with the rows and columns, not with the pixels.
  for (int t = 0; t < TAPS; ++t)
    sums[t] += row[t];
}

/// The taps [first_tap, first_tap + TAPS) of one row of the kernel, for a block of channels.
template <int TAPS, class T>
void depthwise_weight_taps(const DepthwiseWeightJob<accumulator_t<T>> &job, int64_t n,
                           int64_t block, int64_t kernel_row, int64_t first_tap) {
  // The last block reaches back into the one before it: whole vectors are loaded fastest.
  const int64_t lanes = std::min(LANES, job.channels);
  const int64_t channel = std::min(block * LANES, job.channels - lanes);
  const int64_t first_lane = block * LANES - channel;
  using Vector = lane_vector<accumulator_t<T>>;
  Vector sums[TAPS] = {};
  for (int64_t row = 0; row < job.grad.height; ++row) {
    const int64_t x_row = row * job.stride + kernel_row - job.padding;
    if (x_row < 0 || x_row >= job.x.height)
      continue;
    const T *x = job.x.template at<const T>(n, channel, x_row, 0);
    const T *grad = job.grad.template at<const T>(n, channel, row, 0);
    const int64_t shift = first_tap - job.padding;
    if (lanes == LANES)
      add_row<TAPS>(job, x, grad, shift, LANES, sums);
    else
      add_row<TAPS>(job, x, grad, shift, lanes, sums);
  }
  for (int64_t lane = first_lane; lane < lanes; ++lane)
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
    for (int64_t tap = 0; tap < job.kernel_size; tap += MOST_TAPS)
      with_constant<1, 2, 3, 4, 5, 6, 7, MOST_TAPS>(
          std::min<int64_t>(MOST_TAPS, job.kernel_size - tap),
          [&]<int TAPS>() { depthwise_weight_taps<TAPS, T>(job, n, block, kernel_row, tap); });
  }
}
