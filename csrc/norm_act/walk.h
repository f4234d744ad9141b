// The two walks of batch norm, activation and gate over an image: pixel by pixel of channels_last,
// or plane by plane. `Step` is the computation on one vector: see steps.h.

// Pixels of a plane whose sums add up in lanes of their own; as many for all instruction sets, so
// that sums have the same bits.
constexpr int64_t RUN = 32;
// Pixels, or runs of a plane, whose sums are added up in float32 before they join those in float64;
// a group of pixels stays in the first-level cache.
constexpr int64_t GROUP = 16;

template <class Step> constexpr bool WRITES = Step::SUMS == 0;

/// Registers that take a step together. The latency of few sums needs two; more than three sums, or
/// none, hide it in one.
template <class Step> constexpr int TOGETHER = WRITES<Step> || Step::SUMS > 3 ? 1 : 2;

/// Where the vectors of a step lie.
template <class T> struct Place {
  const T *x, *grad;
  T *y;

  template <class Step, class Job>
  static Place of(const Job &job, int64_t n, int64_t c, int64_t w) {
    return {job.x.template at<const T>(n, c, 0, w),
            Step::READS_GRAD ? job.grad.template at<const T>(n, c, 0, w) : nullptr,
            WRITES<Step> ? job.y.template at<T>(n, c, 0, w) : nullptr};
  }
};

/// The factors of a register's channels from `c` on, of which `lanes` exist, or of one channel in
/// all lanes. Offset and tilt are negated, as multiply-adds need them.
template <class Acc>
REVBIFPN_INLINE Factors<vector_of<Acc>> factors_of(const NormJob<Acc> &job, int64_t n, int64_t c,
                                                   int64_t lanes = WIDTH<Acc>) {
  const auto take = [&](const Acc *values, int64_t first, Acc otherwise) {
    if (values == nullptr)
      return splat<vector_of<Acc>>(otherwise);
    if (!job.lanes_are_channels)
      return splat<vector_of<Acc>>(values[first]);
    return load_lanes(values + first, lanes);
  };
  const int64_t plane = n * job.channels + c;
  return {take(job.mean, c, 0),          take(job.invstd, c, 1) * take(job.weight, c, 1),
          take(job.bias, c, 0),          take(job.gate, plane, 1),
          take(job.grad_mean, plane, 0), -take(job.offset, c, 0),
          -take(job.tilt, c, 0)};
}

/// A step of one register, at `offset` elements from the place; sums of other lanes than the first
/// `lanes` are of no use.
template <class Step, class T, class Vector>
REVBIFPN_INLINE void step_at(const Factors<Vector> &factors, const Place<T> &place, int64_t offset,
                             int64_t lanes, Vector *sums) {
  Vector grad = {};
  if constexpr (Step::READS_GRAD)
    grad = load_lanes(place.grad + offset, lanes);
  const Vector x = load_lanes(place.x + offset, lanes);
  if constexpr (WRITES<Step>)
    store_lanes(Step::step(factors, x, grad, sums), place.y + offset, lanes);
  else
    Step::step(factors, x, grad, sums);
}

REVBIFPN_INLINE void add_to(double *totals, Doubles sums) {
  store_vector(load_vector(totals) + sums, totals);
}
REVBIFPN_INLINE void add_to(double *totals, Floats sums) {
  add_to(totals, first_half(sums));
  add_to(totals + WIDTH<double>, second_half(sums));
}

/// totals (SUMS) += sums, where those of a kind lie `pitch` apart.
template <int SUMS, class Vector>
REVBIFPN_INLINE void add_to(double *totals, int64_t pitch, const Vector *sums) {
  REVBIFPN_UNROLLED(k, SUMS) add_to(totals + k * pitch, sums[k]);
}

/// The same for the first `lanes` lanes.
template <int SUMS, class Vector>
REVBIFPN_INLINE void add_first_to(double *totals, int64_t pitch, const Vector *sums,
                                  int64_t lanes) {
  using Acc = std::remove_cvref_t<decltype(sums[0][0])>;
  REVBIFPN_UNROLLED(k, SUMS) {
    Acc values[WIDTH<Acc>];
    store_vector(sums[k], values);
    add_to(totals + k * pitch, load_lanes(values, lanes));
  }
}

/// The first channel of a register: the last one reaches back into the one before it, which it
/// repeats in sums of its own, because whole vectors are loaded fastest.
template <class Acc> REVBIFPN_INLINE int64_t channel_of(const NormJob<Acc> &job, int64_t index) {
  return std::min(index * WIDTH<Acc>, job.channels - WIDTH<Acc>);
}

/// Does a group of pixels for the channels of COUNT registers from `index` on. `means` are those of
/// `Statistics`, whose pixels' differences from them are summed.
template <class Step, int COUNT, class T>
REVBIFPN_INLINE void walk_group(const NormJob<accumulator_t<T>> &job, int64_t n, int64_t index,
                                int64_t begin, int64_t end, double *totals, int64_t pitch,
                                const accumulator_t<T> *means) {
  using Acc = accumulator_t<T>;
  using Vector = vector_of<Acc>;
  const int64_t c = channel_of(job, index);
  Place<T> place = Place<T>::template of<Step>(job, n, c, begin);
  int64_t offset[COUNT];
  Factors<Vector> factors[COUNT];
  Vector sums[COUNT][Step::SUMS + 1] = {};
  REVBIFPN_UNROLLED(r, COUNT) {
    offset[r] = channel_of(job, index + r) - c;
    factors[r] = factors_of(job, n, c + offset[r]);
    if constexpr (std::is_same_v<Step, Statistics>)
      factors[r].mean = load_vector(means + c + offset[r]);
  }
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    // The next group: the hardware does not prefetch lines as far apart as those of a block.
    __builtin_prefetch(place.x + GROUP * job.x.stride_w);
    if constexpr (Step::READS_GRAD)
      __builtin_prefetch(place.grad + GROUP * job.grad.stride_w);
    if constexpr (WRITES<Step>)
      __builtin_prefetch(place.y + GROUP * job.y.stride_w, 1);
    REVBIFPN_UNROLLED(r, COUNT)
    step_at<Step>(factors[r], place, offset[r], WIDTH<Acc>, sums[r]);
    place.x += job.x.stride_w;
    if constexpr (Step::READS_GRAD)
      place.grad += job.grad.stride_w;
    if constexpr (WRITES<Step>)
      place.y += job.y.stride_w;
  }
  REVBIFPN_UNROLLED(r, COUNT)
  add_to<Step::SUMS>(totals + (index + r) * WIDTH<Acc>, pitch, sums[r]);
}

/// The same for maps of fewer channels than a register has lanes.
template <class Step, class T>
__attribute__((noinline)) void walk_group_of_few(const NormJob<accumulator_t<T>> &job, int64_t n,
                                                 int64_t begin, int64_t end, double *totals,
                                                 int64_t pitch, const accumulator_t<T> *means) {
  using Vector = vector_of<accumulator_t<T>>;
  Factors<Vector> factors = factors_of(job, n, 0, job.channels);
  if constexpr (std::is_same_v<Step, Statistics>)
    factors.mean = load_first(means, job.channels);
  Vector sums[Step::SUMS + 1] = {};
  for (int64_t pixel = begin; pixel < end; ++pixel)
    step_at<Step>(factors, Place<T>::template of<Step>(job, n, 0, pixel), 0, job.channels, sums);
  add_first_to<Step::SUMS>(totals, pitch, sums, job.channels);
}

/// The means of the first pixels of a unit, of all channels.
template <class T>
void means_of_first(const T *x, int64_t stride, int64_t pixels, int64_t channels,
                    accumulator_t<T> *means) {
  using Acc = accumulator_t<T>;
  const int64_t count = std::min(GROUP, pixels);
  for (int64_t c = 0; c < channels; c += WIDTH<Acc>) {
    const int64_t lanes = std::min<int64_t>(WIDTH<Acc>, channels - c);
    vector_of<Acc> sum = {};
    for (int64_t pixel = 0; pixel < count; ++pixel)
      sum += load_lanes(x + pixel * stride + c, lanes);
    store_lanes(sum / splat<vector_of<Acc>>(static_cast<double>(count)), means + c, lanes);
  }
}

/// The sum of COUNT values, a power of two, in the same order whatever vectors add them.
template <int COUNT, class Number> REVBIFPN_INLINE Number sum_of_all(Number *values) {
  for (int half = COUNT / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      values[i] += values[i + half];
  return values[0];
}

/// The mean of the first pixels of a plane.
template <class T> accumulator_t<T> mean_of_first(const T *x, int64_t pixels) {
  using Acc = accumulator_t<T>;
  const int64_t count = std::min(GROUP, pixels);
  Acc values[GROUP];
  for (int64_t i = 0; i < GROUP; i += WIDTH<Acc>)
    store_vector(load_lanes(x + i, std::clamp<int64_t>(count - i, 0, WIDTH<Acc>)), values + i);
  return sum_of_all<GROUP>(values) / static_cast<Acc>(count);
}

/// Does one chunk of an image's pixels, all channels.
template <class Step, class T>
void walk_pixels(const NormJob<accumulator_t<T>> &job, int64_t unit, double *workspace) {
  using Acc = accumulator_t<T>;
  constexpr int COUNT = WIDTH<Acc> < LANES ? TOGETHER<Step> : 1;
  const int64_t n = unit / job.chunks(), first = unit % job.chunks() * job.chunk_pixels;
  const int64_t last = std::min(first + job.chunk_pixels, job.pixels);
  const int64_t channels = job.channels, registers = ceil_div(channels, WIDTH<Acc> * COUNT) * COUNT;
  const int64_t pitch = registers * WIDTH<Acc>;
  std::fill_n(workspace, Step::SUMS * pitch, 0.0);
  Acc *means = reinterpret_cast<Acc *>(workspace + Step::SUMS * pitch);
  if constexpr (std::is_same_v<Step, Statistics>)
    means_of_first(job.x.template at<const T>(n, 0, 0, first), job.x.stride_w, last - first,
                   channels, means);
  for (int64_t begin = first; begin < last; begin += GROUP) {
    const int64_t end = std::min(begin + GROUP, last);
    if (channels < WIDTH<Acc>)
      walk_group_of_few<Step, T>(job, n, begin, end, workspace, pitch, means);
    else
      for (int64_t index = 0; index < registers; index += COUNT)
        walk_group<Step, COUNT, T>(job, n, index, begin, end, workspace, pitch, means);
  }
  for (int k = 0; k < Step::SUMS; ++k)
    for (int64_t index = 0; index * WIDTH<Acc> < channels; ++index)
      std::copy_n(workspace + k * pitch + index * WIDTH<Acc>,
                  std::min<int64_t>(WIDTH<Acc>, channels),
                  &job.sum(k, unit, std::max<int64_t>(0, channel_of(job, index))));
}

/// A step of PARTS registers of a pair from part `first` on.
template <class Step, int PARTS, class T, class Vector>
REVBIFPN_INLINE void step_parts(const Factors<Vector> &factors, const Place<T> &place,
                                int64_t offset, int first, Vector (*sums)[Step::SUMS + 1]) {
  Vector results[PARTS];
  REVBIFPN_UNROLLED(r, PARTS) {
    Vector grad = {};
    if constexpr (Step::READS_GRAD)
      grad = load_part(place.grad + offset, first + r);
    const Vector x = load_part(place.x + offset, first + r);
    if constexpr (WRITES<Step>)
      results[r] = Step::step(factors, x, grad, sums[r]);
    else
      Step::step(factors, x, grad, sums[r]);
  }
  if constexpr (WRITES<Step>)
    store_pair(results[0], results[1], place.y + offset);
}

/// Adds the sums over some runs of a plane to `totals`, in the lanes that they are in.
template <class Step, class T, class Vector>
REVBIFPN_INLINE void walk_runs(const Factors<Vector> &factors, const Place<T> &place, int64_t begin,
                               int64_t end, double *totals) {
  constexpr int COUNT = TOGETHER<Step>, ALL = WIDTH<accumulator_t<T>>;
  for (int64_t lane = 0; lane < RUN; lane += 2 * ALL)
    for (int part = 0; part < 2; part += COUNT) {
      Vector sums[COUNT][Step::SUMS + 1] = {};
      for (int64_t pixel = begin + lane; pixel < end; pixel += RUN)
        step_parts<Step, COUNT>(factors, place, pixel, part, sums);
      REVBIFPN_UNROLLED(r, COUNT)
      add_to<Step::SUMS>(totals + lane + (part + r) * ALL, RUN, sums[r]);
    }
}

/// Does the last pixels of a plane, fewer than a run; their sums join `totals` in pixel order.
template <class Step, class T, class Vector>
REVBIFPN_INLINE void walk_rest(const Factors<Vector> &factors, const Place<T> &place, int64_t begin,
                               int64_t end, double *totals) {
  constexpr int64_t ALL = WIDTH<accumulator_t<T>>;
  for (int64_t pixel = begin; pixel < end; pixel += ALL) {
    Vector sums[Step::SUMS + 1] = {};
    const int64_t lanes = std::min(ALL, end - pixel);
    step_at<Step>(factors, place, pixel, lanes, sums);
    if constexpr (!WRITES<Step>)
      add_first_to<Step::SUMS>(totals + (pixel - begin), RUN, sums, lanes);
  }
}

/// Moves the sums of a run, which lie where the lanes of pairs are, into the order of the pixels.
template <class T, int SUMS> REVBIFPN_INLINE void in_pixel_order(double *totals) {
  constexpr int64_t PAIR = 2 * WIDTH<accumulator_t<T>>;
  if constexpr (std::is_same_v<T, BFloat16>)
    for (double *pair = totals; pair < totals + SUMS * RUN; pair += PAIR) {
      double ordered[PAIR];
      for (int64_t i = 0; i < PAIR; ++i)
        ordered[i] = pair[lane_in_pair<T>(i)];
      std::copy_n(ordered, PAIR, pair);
    }
}

/// Does one plane.
template <class Step, class T> void walk_plane(const NormJob<accumulator_t<T>> &job, int64_t unit) {
  using Acc = accumulator_t<T>;
  using Vector = vector_of<Acc>;
  constexpr int SUMS = Step::SUMS;
  const int64_t n = unit / job.channels, c = unit % job.channels;
  const Place<T> place = Place<T>::template of<Step>(job, n, c, 0);
  Factors<Vector> factors = factors_of(job, n, c);
  if constexpr (std::is_same_v<Step, Statistics>)
    factors.mean = splat<Vector>(mean_of_first(place.x, job.pixels));
  const int64_t whole = job.pixels / RUN * RUN;
  if constexpr (WRITES<Step>) {
    for (int64_t pixel = 0; pixel < whole; pixel += 2 * WIDTH<Acc>)
      step_parts<Step, 2, T, Vector>(factors, place, pixel, 0, {});
    walk_rest<Step>(factors, place, whole, job.pixels, nullptr);
  } else {
    double totals[SUMS * RUN];
    // By hand: GCC would zero the array by an instruction that is slow to start.
    for (int k = 0; k < SUMS; ++k)
      REVBIFPN_UNROLLED(i, RUN / WIDTH<double>)
    store_vector(Doubles{}, totals + k * RUN + i * WIDTH<double>);
    for (int64_t begin = 0; begin < whole; begin += GROUP * RUN)
      walk_runs<Step>(factors, place, begin, std::min(begin + GROUP * RUN, whole), totals);
    in_pixel_order<T, SUMS>(totals);
    walk_rest<Step>(factors, place, whole, job.pixels, totals);
    for (int k = 0; k < SUMS; ++k)
      job.sum(k, unit, 0) = sum_of_all<RUN>(totals + k * RUN);
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

template <class T>
void statistics_units(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                      double *workspace) {
  walk_units<Statistics, T>(job, begin, end, workspace);
}

#define REVBIFPN_NORM_KERNEL(name, ...)                                                            \
  template <class T>                                                                               \
  void name(const NormJob<accumulator_t<T>> &job, int64_t begin, int64_t end, double *workspace) { \
    with_act(job.act, [&]<Act ACT>() { walk_units<__VA_ARGS__, T>(job, begin, end, workspace); }); \
  }
REVBIFPN_NORM_KERNEL(means_units, Means<ACT>)
REVBIFPN_NORM_KERNEL(norm_act_units, NormAct<ACT>)
REVBIFPN_NORM_KERNEL(plain_sums_units, GradSums<ACT, false>)
REVBIFPN_NORM_KERNEL(gated_sums_units, GradSums<ACT, true>)
REVBIFPN_NORM_KERNEL(norm_grad_units, NormGrad<ACT>)
#undef REVBIFPN_NORM_KERNEL
