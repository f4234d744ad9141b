// y = x + alpha * sum_k R_k(s_k) on CPUs: checks, division of the work, registration. Kernel:
// add.h.

#include <bit>
#include <cmath>
#include <limits>

#include "resample.h"
#include "taps.h"

namespace revbifpn {
namespace {

// Elements per row of a strip. Three bilinear sources need 6 rows at a time: 24 KiB of float32.
constexpr int64_t STRIP_SIZE = 1024;
// Elements per step, before which its pages are mapped: a step fits the second-level cache.
constexpr int64_t STEP_SIZE = int64_t{1} << 17;

template <class Acc> Acc snap_of(const char *op, std::optional<double> lattice) {
  if (!lattice.has_value())
    return 0;
  STD_TORCH_CHECK(*lattice > 0, op, ": lattice must be a positive power of two, got ", *lattice);
  const Acc snap = static_cast<Acc>(std::ldexp(*lattice, std::numeric_limits<Acc>::digits - 1));
  STD_TORCH_CHECK(std::isfinite(snap), op, ": lattice is too large for the dtype of the sums, got ",
                  *lattice);
  return snap;
}

/// The scales or shifts (N, C) of a source's planes: contiguous, or one row for all images.
template <class Acc>
PlaneFactors<Acc> factors_of(const char *op, const char *name, const Tensor &factors,
                             const Tensor &source) {
  const int64_t images = source.size(0), channels = source.size(1);
  const ScalarType type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(factors.is_cpu() && factors.scalar_type() == type, op, ": ", name,
                  " must be on the CPU, in float32 or beside float64 maps in float64");
  STD_TORCH_CHECK(factors.dim() == 2 && factors.size(0) == images && factors.size(1) == channels,
                  op, ": ", name, " must be of shape (N, C) = (", images, ", ", channels,
                  "), got ", factors.dim(), " dimensions, ", factors.numel(), " elements");
  const bool is_shared = factors.stride(0) == 0 && (channels == 1 || factors.stride(1) == 1);
  STD_TORCH_CHECK(is_shared || factors.is_contiguous(), op, ": ", name,
                  " must be contiguous, or expanded from one row");
  return {data_of<const Acc>(factors), is_shared ? 0 : channels};
}

template <class Acc> Source<Acc> source_of(const char *op, const Addends &addends, size_t k) {
  const Tensor &tensor = addends.sources[k];
  Source<Acc> source = {};
  source.maps = maps_of(op, tensor);
  if (!addends.scales.empty()) {
    source.scale = factors_of<Acc>(op, "scales", addends.scales[k], tensor);
    source.shift = factors_of<Acc>(op, "shifts", addends.shifts[k], tensor);
  }
  return source;
}

template <class Acc>
void find_taps(const char *op, Source<Acc> &source, const Maps &y, const std::string &mode) {
  const int64_t h = source.maps.height, w = source.maps.width;
  source.kind = kind_of(op, h, w, y.height, y.width, mode);
  source.block_h = h / y.height;
  source.block_w = w / y.width;
  source.enlarge_w = whole_factor(source.kind, w, y.width);
  if (!source.is_enlarged())
    return;
  source.rows = taps_of<Acc>(source.kind, h, y.height);
  source.columns = taps_of<Acc>(source.kind, w, y.width);
}

/// Resampled rows that one run of the target's rows reads at most, as a power of two.
template <class Acc>
int64_t ring_rows_of(const Source<Acc> &source, int64_t height, int64_t run_rows) {
  int64_t most = 1;
  for (int64_t row = 0; row < height; ++row) {
    const int64_t last = std::min(row + run_rows, height) - 1;
    most =
        std::max(most, source.last_of(source.rows, last) - source.first_of(source.rows, row) + 1);
  }
  return std::bit_ceil<uint64_t>(most);
}

/// Whole cache lines for `count` elements and PADDING.
constexpr int64_t padded(int64_t count) { return ceil_div(count, LANES) * LANES + PADDING; }

template <class Acc> void size_workspace(AddJob<Acc> &job) {
  const int64_t lanes = job.groups.lane_block, size = job.strip_columns * lanes;
  job.run_rows = std::clamp<int64_t>(RUN_SIZE / size, 1, job.chunk_rows);
  job.strip_size = padded(size);
  job.staged_size = padded(job.run_rows * size);
  int64_t scratch = 0;
  for (Source<Acc> &source : job.sources) {
    source.ring_rows = ring_rows_of(source, job.y.height, job.run_rows);
    const int64_t width = std::min(source.maps.width, job.strip_columns + 2);
    scratch = std::max(scratch, source.kind == Kind::area ? job.strip_columns * source.block_w
                                                          : source.ring_rows * width);
  }
  job.scratch_size = padded(scratch * lanes);
}

/// Takes planes that are only added to one another as one row each, if all pixels of them are
/// evenly spaced.
template <class Acc> void join_rows(AddJob<Acc> &job) {
  std::vector<Maps *> all = {&job.x, &job.y};
  for (Source<Acc> &source : job.sources)
    all.push_back(&source.maps);
  const int64_t height = job.y.height, width = job.y.width;
  for (const Maps *maps : all)
    if (maps->height != height || maps->width != width || maps->stride_h != width * maps->stride_w)
      return;
  for (Maps *maps : all) {
    maps->height = 1;
    maps->width = height * width;
    maps->stride_h = maps->width * maps->stride_w;
  }
}

/// Divides the maps into units: strips first, and chunks of rows where there are few planes for the
/// threads.
template <class Acc> void divide_work(AddJob<Acc> &job, int64_t images, int64_t channels) {
  const Maps &y = job.y;
  job.groups = groups_of(y, channels, STRIP_SIZE);
  job.strips = ceil_div(y.width, STRIP_SIZE / job.groups.lane_block);
  job.strip_columns = ceil_div(y.width, job.strips);
  job.strips = ceil_div(y.width, job.strip_columns);

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = std::max<int64_t>(1, images * job.groups.per_image() * job.strips);
  int64_t wanted_chunks = threads == 1 ? 1 : ceil_div(4 * threads, units);
  // The strips of a chunk fill its memory together, so that a step is a chunk or more.
  if (job.strips > 1)
    wanted_chunks = std::max(wanted_chunks, y.height * y.width * job.groups.lane_block / STEP_SIZE);
  job.row_chunks = std::clamp<int64_t>(wanted_chunks, 1, ceil_div(y.height, 16));
  job.chunk_rows = ceil_div(y.height, job.row_chunks);
  job.row_chunks = ceil_div(y.height, job.chunk_rows);
}

template <class T>
void run_add(const char *op, const Tensor &x, const Tensor &y, const Addends &addends) {
  using Acc = accumulator_t<T>;
  AddJob<Acc> job;
  job.x = maps_of(op, x);
  job.y = maps_of(op, y);
  job.alpha = static_cast<Acc>(addends.alpha);
  job.snap = snap_of<Acc>(op, addends.lattice);
  for (size_t k = 0; k < addends.sources.size(); ++k)
    job.sources.push_back(source_of<Acc>(op, addends, k));
  join_rows(job);
  for (Source<Acc> &source : job.sources)
    find_taps(op, source, job.y, addends.mode);
  divide_work(job, x.size(0), x.size(1));
  size_workspace(job);
  const int64_t units = x.size(0) * job.groups.per_image() * job.strips * job.row_chunks;
  const int64_t elements_per_unit = x.numel() / std::max<int64_t>(1, units);
  // The strips of one row lie one after the other, so each may be a step; those of a chunk do not.
  const int64_t together = job.y.height == 1 ? 1 : job.strips;
  const int64_t chunks = ceil_div(STEP_SIZE, std::max<int64_t>(1, elements_per_unit * together));
  std::vector<FreshMemory> fresh;
  if (job.x.data != job.y.data)
    fresh.emplace_back(y);
  run_units(job, units, x.numel(), REVBIFPN_BEST_KERNEL(add_units, T), fresh, chunks * together);
}

Tensor resample_add_cpu(const Tensor &x, const TensorList &sources, const TensorList &scales,
                        const TensorList &shifts, double alpha, const std::string &mode,
                        std::optional<double> lattice) {
  Tensor y = torch::stable::empty_like(x);
  resample_add_into("resample_add", x, y, {sources, scales, shifts, alpha, mode, lattice});
  return y;
}

void resample_add_cpu_(const Tensor &x, const TensorList &sources, const TensorList &scales,
                       const TensorList &shifts, double alpha, const std::string &mode,
                       std::optional<double> lattice) {
  resample_add_into("resample_add_", x, x, {sources, scales, shifts, alpha, mode, lattice});
}

void resample_add_out_cpu(const Tensor &x, const TensorList &sources, const TensorList &scales,
                          const TensorList &shifts, const Tensor &out, double alpha,
                          const std::string &mode, std::optional<double> lattice) {
  const char *op = "resample_add_out";
  check_like(op, "out", out, "x", x);
  resample_add_into(op, x, out, {sources, scales, shifts, alpha, mode, lattice});
}

} // namespace

void resample_add_into(const char *op, const Tensor &x, const Tensor &y, const Addends &addends) {
  const auto &[sources, scales, shifts, alpha, mode, lattice] = addends;
  const Dtype dtype = check_sources(op, x, sources);
  STD_TORCH_CHECK(scales.size() == shifts.size() &&
                      (scales.empty() || scales.size() == sources.size()),
                  op, ": takes one scale and one shift for each source, or none, got ",
                  scales.size(), " and ", shifts.size(), " for ", sources.size(), " sources");
  dispatch_dtype(dtype, [&]<class T>() { run_add<T>(op, x, y, addends); });
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("resample_add", TORCH_BOX(&resample_add_cpu));
  m.impl("resample_add_", TORCH_BOX(&resample_add_cpu_));
  m.impl("resample_add_out", TORCH_BOX(&resample_add_out_cpu));
}

} // namespace revbifpn
