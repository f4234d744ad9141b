// Batch norm, activation and gate: what is done with a vector of lanes (the Ops), and the two walks
// over an image, pixel by pixel of channels_last or plane by plane.

// Pixels, or vectors of a plane, whose sums are added up in float32 before they join those in
// float64; a group of pixels stays in the first-level cache.
constexpr int64_t GROUP = 16;

/// What is constant over a unit, for 16 lanes.
template <class Vector> struct Factors {
  Act act;
  Vector mean, invstd, weight, bias, gate, grad_mean, offset, tilt;

  /// Not by the product of invstd and weight: its rounding would add up in sums.
  REVBIFPN_INLINE Vector normalised(Vector xc) const { return xc * invstd * weight + bias; }
};

/// `mean` is that of the unit's first pixels, near enough that the squares lose no digits. The
/// values themselves are added up too: a mean of differences would keep their rounding.
struct Statistics {
  static constexpr int SUMS = 3;
  static constexpr bool READS_GRAD = false, WRITES = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *sums,
                                   Vector &) {
    const Vector xc = x - f.mean;
    sums[0] += xc;
    sums[1] += xc * xc;
    sums[2] += x;
  }
};

struct Means {
  static constexpr int SUMS = 1;
  static constexpr bool READS_GRAD = false, WRITES = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *sums,
                                   Vector &) {
    sums[0] += act_lanes(f.act, f.normalised(x - f.mean));
  }
};

struct NormAct {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = false, WRITES = true;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *,
                                   Vector &y) {
    y = act_lanes(f.act, f.normalised(x - f.mean)) * f.gate;
  }
};

template <bool GATED> struct GradSums {
  static constexpr int SUMS = GATED ? 5 : 2;
  static constexpr bool READS_GRAD = true, WRITES = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector grad, Vector *sums,
                                   Vector &) {
    const Vector xc = x - f.mean, z = f.normalised(xc);
    const Vector slope = slope_lanes(f.act, z), pulled = grad * slope;
    sums[0] += pulled;
    sums[1] += pulled * xc;
    if constexpr (GATED) {
      sums[2] += slope;
      sums[3] += slope * xc;
      sums[4] += grad * act_lanes(f.act, z);
    }
  }
};

struct NormGrad {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = true, WRITES = true;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector grad, Vector *,
                                   Vector &dx) {
    const Vector xc = x - f.mean, z = f.normalised(xc);
    const Vector dz = (grad * f.gate + f.grad_mean) * slope_lanes(f.act, z);
    dx = f.invstd * f.weight * (dz - f.offset - f.tilt * xc);
  }
};

/// The factors of `lanes` channels from `c` on, or of one channel in all lanes.
template <class Acc>
REVBIFPN_INLINE Factors<lane_vector<Acc>> factors_of(const NormJob<Acc> &job, int64_t n, int64_t c,
                                                     int64_t lanes) {
  const auto take = [&](const Acc *values, int64_t first, Acc otherwise) {
    if (values == nullptr)
      return broadcast(otherwise);
    return job.lanes_are_channels ? load_lanes(values + first, lanes) : broadcast(values[first]);
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

template <class Op, class T, class Vector>
REVBIFPN_INLINE void step_at(const Factors<Vector> &factors, const T *x, const T *grad, T *y,
                             int64_t lanes, Vector *sums) {
  Vector gradient = {}, result = {};
  const Vector value = load_lanes(x, lanes);
  if constexpr (Op::READS_GRAD)
    gradient = load_lanes(grad, lanes);
  Op::step(factors, value, gradient, sums, result);
  if constexpr (Op::WRITES)
    store_lanes<T>(result, y, lanes);
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

/// A group of pixels for 16 channels.
template <class Op, bool IS_WHOLE, class T>
REVBIFPN_INLINE void walk_group(const NormJob<accumulator_t<T>> &job,
                                const Factors<lane_vector<accumulator_t<T>>> &factors, int64_t n,
                                int64_t c, int64_t begin, int64_t end, int64_t lanes,
                                double *totals) {
  const T *x = job.x.template at<const T>(n, c, 0, begin);
  const T *grad = Op::READS_GRAD ? job.grad.template at<const T>(n, c, 0, begin) : nullptr;
  T *y = Op::WRITES ? job.y.template at<T>(n, c, 0, begin) : nullptr;
  lane_vector<accumulator_t<T>> sums[Op::SUMS + 1] = {};
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    // The next group's: the lines of a block lie too far apart for the hardware to foresee.
    __builtin_prefetch(x + GROUP * job.x.stride_w);
    if constexpr (Op::READS_GRAD)
      __builtin_prefetch(grad + GROUP * job.grad.stride_w);
    if constexpr (Op::WRITES)
      __builtin_prefetch(y + GROUP * job.y.stride_w, 1);
    step_at<Op>(factors, x, grad, y, IS_WHOLE ? LANES : lanes, sums);
    x += job.x.stride_w;
    if constexpr (Op::READS_GRAD)
      grad += job.grad.stride_w;
    if constexpr (Op::WRITES)
      y += job.y.stride_w;
  }
  add_to<Op::SUMS>(totals, sums);
}

/// The mean of the first pixels of a unit.
template <class T>
REVBIFPN_INLINE lane_vector<accumulator_t<T>> mean_of_first(const T *x, int64_t stride,
                                                            int64_t pixels, int64_t lanes) {
  const int64_t count = std::min(GROUP, pixels);
  lane_vector<accumulator_t<T>> sum = {};
  for (int64_t pixel = 0; pixel < count; ++pixel)
    sum += load_lanes(x + pixel * stride, lanes);
  return sum / broadcast(static_cast<accumulator_t<T>>(count));
}

/// One chunk of an image's pixels, all channels.
template <class Op, class T>
void walk_pixels(const NormJob<accumulator_t<T>> &job, int64_t unit, double *workspace) {
  const int64_t n = unit / job.chunks(), first = unit % job.chunks() * job.chunk_pixels;
  const int64_t last = std::min(first + job.chunk_pixels, job.pixels);
  const int64_t lanes = std::min(LANES, job.channels);
  std::fill_n(workspace, workspace_size(job), 0.0);
  double *means = workspace + job.blocks() * Op::SUMS * LANES;
  if constexpr (std::is_same_v<Op, Statistics>)
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
      if constexpr (std::is_same_v<Op, Statistics>)
        for (int64_t lane = 0; lane < LANES; ++lane)
          factors.mean[lane] = static_cast<accumulator_t<T>>(means[block * LANES + lane]);
      double *totals = workspace + block * Op::SUMS * LANES;
      if (lanes == LANES)
        walk_group<Op, true, T>(job, factors, n, c, begin, end, lanes, totals);
      else
        walk_group<Op, false, T>(job, factors, n, c, begin, end, lanes, totals);
    }
  }
  for (int64_t block = 0; block < job.blocks(); ++block)
    for (int k = 0; k < Op::SUMS; ++k)
      std::copy_n(workspace + (block * Op::SUMS + k) * LANES, lanes,
                  &job.sum(k, unit, std::min(block * LANES, job.channels - lanes)));
}

template <class T> REVBIFPN_INLINE T *ahead(T *values, int64_t elements) {
  return values == nullptr ? nullptr : values + elements;
}

/// One plane.
template <class Op, class T> void walk_plane(const NormJob<accumulator_t<T>> &job, int64_t unit) {
  const int64_t n = unit / job.channels, c = unit % job.channels;
  const T *x = job.x.template at<const T>(n, c, 0, 0);
  const T *grad = Op::READS_GRAD ? job.grad.template at<const T>(n, c, 0, 0) : nullptr;
  T *y = Op::WRITES ? job.y.template at<T>(n, c, 0, 0) : nullptr;
  auto factors = factors_of(job, n, c, LANES);
  if constexpr (std::is_same_v<Op, Statistics>)
    factors.mean = broadcast(mean_of_first(x, 1, job.pixels, 1)[0]);
  double totals[(Op::SUMS + 1) * LANES] = {};
  const int64_t whole = job.pixels / LANES * LANES;
  for (int64_t begin = 0; begin < whole; begin += GROUP * LANES) {
    const int64_t end = std::min(begin + GROUP * LANES, whole);
    lane_vector<accumulator_t<T>> sums[Op::SUMS + 1] = {};
    for (int64_t pixel = begin; pixel < end; pixel += LANES)
      step_at<Op>(factors, x + pixel, ahead(grad, pixel), ahead(y, pixel), LANES, sums);
    add_to<Op::SUMS>(totals, sums);
  }
  if (whole < job.pixels) {
    lane_vector<accumulator_t<T>> part[Op::SUMS + 1] = {};
    const int64_t lanes = job.pixels - whole;
    step_at<Op>(factors, x + whole, ahead(grad, whole), ahead(y, whole), lanes, part);
    for (int k = 0; k < Op::SUMS; ++k)
      for (int64_t lane = 0; lane < lanes; ++lane)
        totals[k * LANES + lane] += part[k][lane];
  }
  for (int k = 0; k < Op::SUMS; ++k) {
    double sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane)
      sum += totals[k * LANES + lane];
    job.sum(k, unit, 0) = sum;
  }
}

template <class Op, class T>
void walk_units(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                double *workspace) {
  for (int64_t unit = begin; unit < end; ++unit)
    if (job.lanes_are_channels)
      walk_pixels<Op, T>(job, unit, workspace);
    else
      walk_plane<Op, T>(job, unit);
}

#define REVBIFPN_NORM_KERNEL(name, Op)                                                             \
  template <class T>                                                                               \
  void name(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end, double *workspace) { \
    walk_units<Op, T>(job, begin, end, workspace);                                                 \
  }
REVBIFPN_NORM_KERNEL(statistics_units, Statistics)
REVBIFPN_NORM_KERNEL(means_units, Means)
REVBIFPN_NORM_KERNEL(norm_act_units, NormAct)
REVBIFPN_NORM_KERNEL(plain_sums_units, GradSums<false>)
REVBIFPN_NORM_KERNEL(gated_sums_units, GradSums<true>)
REVBIFPN_NORM_KERNEL(norm_grad_units, NormGrad)
#undef REVBIFPN_NORM_KERNEL
