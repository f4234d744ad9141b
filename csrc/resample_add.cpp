// y = x + alpha * sum_k R_k(s_k) on CPUs: checks, plan of the work, registration. Kernel:
// kernels/add.h.

#include <bit>
#include <cmath>
#include <limits>

#include "common.h"
#include "taps.h"

namespace revbifpn {
namespace {

// Elements of a row of a strip. Three sources keep 8 rows in use: 64 KiB of float32.
constexpr int64_t STRIP_SIZE = 1024;
// Elements of a step between which pages are mapped: what the second-level cache holds.
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

/// The factors of source k for each plane of x, or null where there are none.
template <class Acc>
const Acc *factors_of(const char *op, const std::vector<Tensor> &factors, size_t k,
                      const Tensor &x) {
  if (factors.empty())
    return nullptr;
  const Tensor &factor = factors[k];
  STD_TORCH_CHECK(factor.is_cpu() && factor.is_contiguous() && factor.dim() == 2 &&
                      factor.size(0) == x.size(0) && factor.size(1) == x.size(1),
                  op, ": scales and shifts must be contiguous on the CPU, of shape (N, C)");
  constexpr bool is_double = std::is_same_v<Acc, double>;
  STD_TORCH_CHECK(factor.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float), op,
                  ": scales and shifts must be float32, or float64 beside a float64 x");
  return static_cast<const Acc *>(factor.data_ptr());
}

template <class Acc>
Source<Acc> source_of(const char *op, const Tensor &tensor, const Maps &y,
                      const std::string &mode) {
  Source<Acc> source;
  source.maps = maps_of(op, tensor);
  const int64_t h = source.maps.height, w = source.maps.width;
  source.kind = kind_of(op, h, w, y.height, y.width, mode);
  source.block_h = h / y.height;
  source.block_w = w / y.width;
  source.enlarge_w = whole_factor(source.kind, w, y.width);
  source.rows = taps_of<Acc>(source.kind, h, y.height);
  source.columns = taps_of<Acc>(source.kind, w, y.width);
  return source;
}

/// Resampled rows that one run of the target's rows reads at most, as a power of two.
template <class Acc> int64_t ring_rows_of(const Source<Acc> &source, int64_t run_rows) {
  const std::vector<int32_t> &first = source.rows.first;
  const std::vector<int32_t> &last = source.kind == Kind::bilinear ? source.rows.second : first;
  const int64_t height = static_cast<int64_t>(first.size());
  int64_t most = 1;
  for (int64_t row = 0; row < height; ++row)
    most = std::max<int64_t>(most, last[std::min(row + run_rows, height) - 1] - first[row] + 1);
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(most)));
}

template <class Acc> void plan_workspace(AddJob<Acc> &job) {
  const int64_t lanes = job.lanes.lane_block, size = job.strip_columns * lanes;
  job.run_rows = std::clamp<int64_t>(RUN_SIZE / size, 1, job.chunk_rows);
  job.strip_size = size + PADDING;
  job.run_size = job.run_rows * size + PADDING;
  int64_t scratch = 0;
  for (Source<Acc> &source : job.sources) {
    source.ring_rows = ring_rows_of(source, job.run_rows);
    const int64_t width = std::min(source.maps.width, job.strip_columns + 2);
    scratch = std::max(scratch, source.kind == Kind::area ? job.strip_columns * source.block_w
                                                          : source.ring_rows * width);
  }
  job.scratch_size = scratch * lanes + PADDING;
}

/// Cuts the maps into units: strips first, and chunks of rows where there are few planes for the
/// threads.
template <class Acc> void plan_units(AddJob<Acc> &job, int64_t images, int64_t channels) {
  const Maps &y = job.y;
  const bool lanes_are_channels = y.stride_c == 1 && y.stride_w != 1;
  job.lanes = {channels, lanes_are_channels ? std::clamp<int64_t>(channels, 1, STRIP_SIZE) : 1};
  job.strips = ceil_div(y.width, STRIP_SIZE / job.lanes.lane_block);
  job.strip_columns = ceil_div(y.width, job.strips);
  job.strips = ceil_div(y.width, job.strip_columns);

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = std::max<int64_t>(1, images * job.lanes.blocks() * job.strips);
  int64_t wanted_chunks = threads == 1 ? 1 : ceil_div(4 * threads, units);
  // The strips of a chunk fill its memory together, so that a step is a chunk or more.
  if (job.strips > 1)
    wanted_chunks = std::max(wanted_chunks, y.height * y.width * job.lanes.lane_block / STEP_SIZE);
  job.row_chunks = std::clamp<int64_t>(wanted_chunks, 1, ceil_div(y.height, 16));
  job.chunk_rows = ceil_div(y.height, job.row_chunks);
  job.row_chunks = ceil_div(y.height, job.chunk_rows);
}

template <class T>
void run_add(const char *op, const Tensor &x, const Maps &y, const std::vector<Tensor> &sources,
             const std::vector<Tensor> &scales, const std::vector<Tensor> &shifts, double alpha,
             const std::string &mode, std::optional<double> lattice) {
  using Acc = accumulator_t<T>;
  const int64_t images = x.size(0), channels = x.size(1);
  AddJob<Acc> job;
  job.x = maps_of(op, x);
  job.y = y;
  job.alpha = static_cast<Acc>(alpha);
  job.snap = snap_of<Acc>(op, lattice);
  for (size_t k = 0; k < sources.size(); ++k) {
    job.sources.push_back(source_of<Acc>(op, sources[k], y, mode));
    job.sources[k].scale = factors_of<Acc>(op, scales, k, x);
    job.sources[k].shift = factors_of<Acc>(op, shifts, k, x);
  }
  plan_units(job, images, channels);
  plan_workspace(job);
  const int64_t units = images * job.lanes.blocks() * job.strips * job.row_chunks;
  const int64_t elements = images * channels * y.height * y.width;
  std::vector<FreshMemory> fresh;
  if (job.x.data != y.data)
    fresh.emplace_back(y, elements, sizeof(T));
  const int64_t elements_per_unit = elements / std::max<int64_t>(1, units);
  const int64_t chunks = ceil_div(STEP_SIZE, std::max<int64_t>(1, elements_per_unit * job.strips));
  run_units(job, units, chunks * job.strips, elements, fresh, REVBIFPN_BEST_KERNEL(add_units, T));
}

Tensor resample_add_cpu(const Tensor &x, const std::vector<Tensor> &sources,
                        const std::vector<Tensor> &scales, const std::vector<Tensor> &shifts,
                        double alpha, const std::string &mode, std::optional<double> lattice) {
  Tensor y = torch::stable::empty_like(x);
  resample_add_into("resample_add", x, y, sources, scales, shifts, alpha, mode, lattice);
  return y;
}

void resample_add_cpu_(const Tensor &x, const std::vector<Tensor> &sources,
                       const std::vector<Tensor> &scales, const std::vector<Tensor> &shifts,
                       double alpha, const std::string &mode, std::optional<double> lattice) {
  resample_add_into("resample_add_", x, x, sources, scales, shifts, alpha, mode, lattice);
}

void resample_add_out_cpu(const Tensor &x, const std::vector<Tensor> &sources,
                          const std::vector<Tensor> &scales, const std::vector<Tensor> &shifts,
                          const Tensor &out, double alpha, const std::string &mode,
                          std::optional<double> lattice) {
  const char *op = "resample_add_out";
  check_like(op, "out", out, "x", x);
  resample_add_into(op, x, out, sources, scales, shifts, alpha, mode, lattice);
}

} // namespace

void resample_add_into(const char *op, const Tensor &x, const Tensor &y,
                       const std::vector<Tensor> &sources, const std::vector<Tensor> &scales,
                       const std::vector<Tensor> &shifts, double alpha, const std::string &mode,
                       std::optional<double> lattice) {
  const Maps x_maps = maps_of(op, x), y_maps = maps_of(op, y);
  check_count(op, sources.size());
  STD_TORCH_CHECK(scales.size() == shifts.size() &&
                      (scales.empty() || scales.size() == sources.size()),
                  op, ": takes one scale and one shift for each source, or none, got ",
                  scales.size(), " and ", shifts.size(), " for ", sources.size(), " sources");
  for (const Tensor &source : sources) {
    const Maps maps = maps_of(op, source);
    check_same_planes(op, x, source);
    check_precision(op, maps.dtype, x_maps.dtype);
  }
  dispatch_dtype(x_maps.dtype, [&](auto element) {
    run_add<decltype(element)>(op, x, y_maps, sources, scales, shifts, alpha, mode, lattice);
  });
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("resample_add", TORCH_BOX(&resample_add_cpu));
  m.impl("resample_add_", TORCH_BOX(&resample_add_cpu_));
  m.impl("resample_add_out", TORCH_BOX(&resample_add_out_cpu));
}

} // namespace revbifpn
