// [alpha * transpose(R_k)(grad)] on CPUs: checks, division of the work, registration. Kernel:
// adjoint.h.

#include <bit>

#include "resample.h"
#include "taps.h"

namespace revbifpn {
namespace {

// Most elements per row of grad in channels_last. Rows of all channels are dense and are read in
// place, which matters more than that the rows in use fit the second-level cache.
constexpr int64_t ROW_SIZE = 32768;
// Fewest channels that are read together: a cache line of half precision.
constexpr int64_t MIN_LANES = 32;

template <class Acc>
Result<Acc> result_of(const char *op, const Tensor &tensor, const Maps &grad, double alpha,
                      const std::string &mode) {
  Result<Acc> result;
  result.maps = maps_of(op, tensor);
  const int64_t h = result.maps.height, w = result.maps.width;
  const Kind kind = kind_of(op, h, w, grad.height, grad.width, mode);
  const double block =
      kind == Kind::area ? static_cast<double>(h / grad.height * (w / grad.width)) : 1;
  result.scale = static_cast<Acc>(alpha / block);
  result.enlarge_w = whole_factor(kind, w, grad.width);
  result.rows = gather_of<Acc>(kind, h, grad.height);
  result.columns = gather_of<Acc>(kind, w, grad.width);
  return result;
}

/// Divides the maps into units: chunks of rows where there are few planes for the threads.
template <class Acc> void divide_work(AdjointJob<Acc> &job, int64_t images, int64_t channels) {
  const int64_t most = std::max(MIN_LANES, ROW_SIZE / job.grad.width / MIN_LANES * MIN_LANES);
  job.groups = groups_of(job.grad, channels, most);
  const int64_t groups = std::max<int64_t>(1, images * job.groups.per_image());
  const int64_t threads = torch::stable::get_num_threads();
  job.row_chunks = threads == 1 ? 1
                                : std::clamp<int64_t>(ceil_div(4 * threads, groups), 1,
                                                      ceil_div(job.grad.height, 16));
}

template <class Acc> void size_workspace(AdjointJob<Acc> &job) {
  const int64_t lanes = job.groups.lane_block, size = job.grad.width * lanes;
  int64_t most_terms = 1, width = 0;
  for (const Result<Acc> &result : job.results) {
    width = std::max(width, result.maps.width);
    for (int64_t r = 0; r < result.maps.height; ++r)
      most_terms = std::max(most_terms, result.rows.terms(r));
  }
  const uint64_t run_rows = std::clamp<int64_t>(RUN_SIZE / size, 1, job.grad.height);
  job.run_rows = std::bit_floor(run_rows);
  // While a run is loaded, all earlier rows of the ring but the oldest are still needed.
  job.ring_rows = std::bit_ceil<uint64_t>(most_terms + job.run_rows - 1);
  job.ring_size = job.ring_rows * size + PADDING;
  job.run_size = job.run_rows * size + PADDING;
  job.finished_size = std::max(width * lanes, RUN_SIZE) + PADDING;
}

template <class T>
void run_adjoint(const char *op, const Tensor &grad, const TensorList &results, double alpha,
                 const std::string &mode) {
  AdjointJob<accumulator_t<T>> job;
  job.grad = maps_of(op, grad);
  for (const Tensor &result : results)
    job.results.push_back(result_of<accumulator_t<T>>(op, result, job.grad, alpha, mode));
  divide_work(job, grad.size(0), grad.size(1));
  size_workspace(job);
  const int64_t units = grad.size(0) * job.groups.per_image() * job.row_chunks;
  const std::vector<FreshMemory> fresh(results.begin(), results.end());
  run_units(job, units, grad.numel(), REVBIFPN_BEST_KERNEL(adjoint_units, T), fresh);
}

TensorList resample_adjoint_cpu(const Tensor &grad, const std::vector<int64_t> &sizes, double alpha,
                                const std::string &mode, ScalarType dtype) {
  const char *op = "resample_adjoint";
  const Maps maps = maps_of(op, grad);
  STD_TORCH_CHECK(sizes.size() % 2 == 0, op, ": sizes must be pairs, got ", sizes.size(),
                  " numbers");
  TensorList results;
  for (size_t k = 0; k < sizes.size(); k += 2) {
    kind_of(op, sizes[k], sizes[k + 1], maps.height, maps.width, mode);
    results.push_back(
        new_tensor(grad, {grad.size(0), grad.size(1), sizes[k], sizes[k + 1]}, dtype,
                   is_channels_last(grad) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
  }
  resample_adjoint_into(op, grad, results, alpha, mode);
  return results;
}

} // namespace

void resample_adjoint_into(const char *op, const Tensor &grad, const TensorList &results,
                           double alpha, const std::string &mode) {
  const Dtype dtype = check_sources(op, grad, results);
  dispatch_dtype(dtype, [&]<class T>() { run_adjoint<T>(op, grad, results, alpha, mode); });
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("resample_adjoint", TORCH_BOX(&resample_adjoint_cpu));
}

} // namespace revbifpn
