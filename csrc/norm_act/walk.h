// The two walks of batch norm, activation and gate over an image: pixel by pixel of channels_last,
// or plane by plane. `Step` is the computation on one vector of lanes: see steps.h.

// Pixels, or vectors of a plane, whose sums are added up in float32 before they join those in
// float64; a group of pixels stays in the first-level cache.
constexpr int64_t GROUP = 16;

template <class Step> constexpr bool WRITES = Step::SUMS == 0;

/// The factors of `lanes` channels from `c` on, or of one channel in all lanes.
template <class Acc>
REVBIFPN_INLINE Factors<lane_vector<Acc>> factors_of(const NormJob<Acc> &job, int64_t n, int64_t c,
                                                     int64_t lanes) {
  const auto take = [&](const Acc *values, int64_t first, Acc otherwise) {
    if (values == nullptr)
      return splat<lane_vector<Acc>>(otherwise);
    return job.lanes_are_channels ? load_lanes(values + first, lanes)
                                  : splat<lane_vector<Acc>>(values[first]);
  };
  const int64_t plane = n * job.channels + c;
  return {job.act,
          take(job.mean, c, 0),
          take(job.invstd, c, 1),
          take(job.weight, c, 1),
          take(job.bias, c, 0),
          take(job.gate, plane, 1),
          take(job.grad_mean, plane, 0),
          take(job.offset, c, 0),
          take(job.tilt, c, 0)};
}

template <class Step, class T, class Vector>
REVBIFPN_INLINE void step_at(const Factors<Vector> &factors, const T *x, const T *grad, T *y,
                             int64_t lanes, Vector *sums) {
  Vector gradient = {};
  const Vector value = load_lanes(x, lanes);
  if constexpr (Step::READS_GRAD)
    gradient = load_lanes(grad, lanes);
  if constexpr (WRITES<Step>)
    store_lanes<T>(Step::step(factors, value, gradient, sums), y, lanes);
  else
    Step::step(factors, value, gradient, sums);
}

/// totals (SUMS, 16) += sums.
template <int SUMS, class Vector> REVBIFPN_INLINE void add_to(double *totals, const Vector *sums) {
  using Acc = std::remove_cvref_t<decltype(sums[0][0])>;
  for (int k = 0; k < SUMS; ++k) {
    Acc values[LANES];
    __builtin_memcpy(values, sums + k, sizeof(values));
    REVBIFPN_LANES totals[k * LANES + lane] += values[lane];
  }
}

/// Does a group of pixels for LANES channels.
template <class Step, bool IS_WHOLE, class T>
REVBIFPN_INLINE void walk_group(const NormJob<accumulator_t<T>> &job,
                                const Factors<lane_vector<accumulator_t<T>>> &factors, int64_t n,
                                int64_t c, int64_t begin, int64_t end, int64_t lanes,
                                double *totals) {
  const T *x = job.x.template at<const T>(n, c, 0, begin);
  const T *grad = Step::READS_GRAD ? job.grad.template at<const T>(n, c, 0, begin) : nullptr;
  T *y = WRITES<Step> ? job.y.template at<T>(n, c, 0, begin) : nullptr;
  lane_vector<accumulator_t<T>> sums[Step::SUMS + 1] = {};
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    // The next group: the hardware does not prefetch lines as far apart as those of a block.
    __builtin_prefetch(x + GROUP * job.x.stride_w);
    if constexpr (Step::READS_GRAD)
      __builtin_prefetch(grad + GROUP * job.grad.stride_w);
    if constexpr (WRITES<Step>)
      __builtin_prefetch(y + GROUP * job.y.stride_w, 1);
    step_at<Step>(factors, x, grad, y, IS_WHOLE ? LANES : lanes, sums);
    x += job.x.stride_w;
    if constexpr (Step::READS_GRAD)
      grad += job.grad.stride_w;
    if constexpr (WRITES<Step>)
      y += job.y.stride_w;
  }
  add_to<Step::SUMS>(totals, sums);
}

/// The mean of the first pixels of a unit.
template <class T>
REVBIFPN_INLINE lane_vector<accumulator_t<T>> mean_of_first(const T *x, int64_t stride,
                                                            int64_t pixels, int64_t lanes) {
  using Vector = lane_vector<accumulator_t<T>>;
  const int64_t count = std::min(GROUP, pixels);
  Vector sum = {};
  for (int64_t pixel = 0; pixel < count; ++pixel)
    sum += load_lanes(x + pixel * stride, lanes);
  return sum / splat<Vector>(static_cast<double>(count));
}

/// Does one chunk of an image's pixels, all channels.
template <class Step, class T>
void walk_pixels(const NormJob<accumulator_t<T>> &job, int64_t unit, double *workspace) {
  const int64_t n = unit / job.chunks(), first = unit % job.chunks() * job.chunk_pixels;
  const int64_t last = std::min(first + job.chunk_pixels, job.pixels);
  const int64_t lanes = std::min(LANES, job.channels);
  std::fill_n(workspace, job.workspace_size(), 0.0);
  double *means = workspace + job.blocks() * Step::SUMS * LANES;
  if constexpr (std::is_same_v<Step, Statistics>)
    for (int64_t block = 0; block < job.blocks(); ++block) {
      const int64_t c = std::min(block * LANES, job.channels - lanes);
      const T *x = job.x.template at<const T>(n, c, 0, first);
      const auto mean = mean_of_first(x, job.x.stride_w, last - first, lanes);
      for (int64_t lane = 0; lane < LANES; ++lane)
        means[block * LANES + lane] = mean[lane];
    }
  for (int64_t begin = first; begin < last; begin += GROUP) {
    const int64_t end = std::min(begin + GROUP, last);
    for (int64_t block = 0; block < job.blocks(); ++block) {
      // The last block reaches back into the one before it: whole vectors are loaded fastest.
      const int64_t c = std::min(block * LANES, job.channels - lanes);
      auto factors = factors_of(job, n, c, lanes);
      if constexpr (std::is_same_v<Step, Statistics>)
        for (int64_t lane = 0; lane < LANES; ++lane)
          factors.mean[lane] = static_cast<accumulator_t<T>>(means[block * LANES + lane]);
      double *totals = workspace + block * Step::SUMS * LANES;
      if (lanes == LANES)
        walk_group<Step, true, T>(job, factors, n, c, begin, end, lanes, totals);
      else
        walk_group<Step, false, T>(job, factors, n, c, begin, end, lanes, totals);
    }
  }
  for (int64_t block = 0; block < job.blocks(); ++block)
    for (int k = 0; k < Step::SUMS; ++k)
      std::copy_n(workspace + (block * Step::SUMS + k) * LANES, lanes,
                  &job.sum(k, unit, std::min(block * LANES, job.channels - lanes)));
}

template <class T> REVBIFPN_INLINE T *ahead(T *values, int64_t elements) {
  return values == nullptr ? nullptr : values + elements;
}

/// Does one plane.
template <class Step, class T> void walk_plane(const NormJob<accumulator_t<T>> &job, int64_t unit) {
  const int64_t n = unit / job.channels, c = unit % job.channels;
  const T *x = job.x.template at<const T>(n, c, 0, 0);
  const T *grad = Step::READS_GRAD ? job.grad.template at<const T>(n, c, 0, 0) : nullptr;
  T *y = WRITES<Step> ? job.y.template at<T>(n, c, 0, 0) : nullptr;
  auto factors = factors_of(job, n, c, LANES);
  if constexpr (std::is_same_v<Step, Statistics>)
    factors.mean = splat<decltype(factors.mean)>(mean_of_first(x, 1, job.pixels, 1)[0]);
  double totals[(Step::SUMS + 1) * LANES] = {};
  const int64_t whole = job.pixels / LANES * LANES;
  for (int64_t begin = 0; begin < whole; begin += GROUP * LANES) {
    const int64_t end = std::min(begin + GROUP * LANES, whole);
    lane_vector<accumulator_t<T>> sums[Step::SUMS + 1] = {};
    for (int64_t pixel = begin; pixel < end; pixel += LANES)
      step_at<Step>(factors, x + pixel, ahead(grad, pixel), ahead(y, pixel), LANES, sums);
    add_to<Step::SUMS>(totals, sums);
  }
  if (whole < job.pixels) {
    lane_vector<accumulator_t<T>> part[Step::SUMS + 1] = {};
    const int64_t lanes = job.pixels - whole;
    step_at<Step>(factors, x + whole, ahead(grad, whole), ahead(y, whole), lanes, part);
    for (int k = 0; k < Step::SUMS; ++k)
      for (int64_t lane = 0; lane < lanes; ++lane)
        totals[k * LANES + lane] += part[k][lane];
  }
  for (int k = 0; k < Step::SUMS; ++k) {
    double sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane)
      sum += totals[k * LANES + lane];
    job.sum(k, unit, 0) = sum;
  }
}

template <class Step, class T>
void walk_units(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                double *workspace) {
  for (int64_t unit = begin; unit < end; ++unit)
    if (job.lanes_are_channels)
      walk_pixels<Step, T>(job, unit, workspace);
    else
      walk_plane<Step, T>(job, unit);
}

#define REVBIFPN_NORM_KERNEL(name, Step)                                                           \
  template <class T>                                                                               \
  void name(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end, double *workspace) { \
    walk_units<Step, T>(job, begin, end, workspace);                                               \
  }
REVBIFPN_NORM_KERNEL(statistics_units, Statistics)
REVBIFPN_NORM_KERNEL(means_units, Means)
REVBIFPN_NORM_KERNEL(norm_act_units, NormAct)
REVBIFPN_NORM_KERNEL(plain_sums_units, GradSums<false>)
REVBIFPN_NORM_KERNEL(gated_sums_units, GradSums<true>)
REVBIFPN_NORM_KERNEL(norm_grad_units, NormGrad)
#undef REVBIFPN_NORM_KERNEL
