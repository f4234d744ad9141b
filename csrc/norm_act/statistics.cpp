// The mean and spread of a batch on CPUs. Kernel: walk.h, with the step Statistics.

#include <cmath>

#include "norm_act.h"

namespace revbifpn {
namespace {

/// A batch's count, mean and sum of squared differences from it, of one channel.
struct Moments {
  long double count = 0, sum = 0, mean = 0, spread = 0;

  /// Chan, Golub and LeVeque's rule.
  void add(long double other_count, long double other_sum, long double other_spread) {
    const long double all = count + other_count, distance = other_sum / other_count - mean;
    spread += std::max(other_spread, 0.0L) + distance * distance * count * other_count / all;
    count = all;
    sum += other_sum;
    mean = sum / count;
  }
};

template <class Acc> Moments moments_of(const NormJob<Acc> &job, int64_t c) {
  Moments moments;
  const int64_t chunks = job.chunks();
  for (int64_t n = 0; n < job.images; ++n)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t left = job.pixels - chunk * job.chunk_pixels;
      const double count =
          static_cast<double>(chunks == 1 ? job.pixels : std::min(job.chunk_pixels, left));
      const double difference = job.sum_of(0, n, c, chunk), squares = job.sum_of(1, n, c, chunk);
      moments.add(count, job.sum_of(2, n, c, chunk), squares - difference * difference / count);
    }
  return moments;
}

/// The values of a running statistic, which is updated, or null.
template <class Acc>
Acc *running_of(const char *name, const OptionalTensor &tensor, int64_t channels) {
  return const_cast<Acc *>(values_of<Acc>("batch_statistics", name, tensor, channels));
}

template <class Acc> void update(Acc &running, long double value, double momentum) {
  running = static_cast<Acc>(running + momentum * (value - running));
}

std::tuple<Tensor, Tensor> batch_statistics_cpu(const Tensor &x_given, double eps,
                                                const OptionalTensor &running_mean,
                                                const OptionalTensor &running_var,
                                                const OptionalTensor &batches, double momentum) {
  const char *op = "batch_statistics";
  const Tensor x = walked(op, x_given);
  const int64_t channels = x.size(1);
  const Tensor mean = new_sums(op, x, {channels}), invstd = new_sums(op, x, {channels});
  STD_TORCH_CHECK(!batches || (batches->is_cpu() && batches->numel() == 1 &&
                               batches->scalar_type() == ScalarType::Long),
                  op, ": batches must be one int64");
  dispatch_dtype(maps_of(op, x).dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    NormJob<Acc> job = job_of<Acc>(op, x);
    Acc *running_means = running_of<Acc>("running_mean", running_mean, channels);
    Acc *running_vars = running_of<Acc>("running_var", running_var, channels);
    const auto sums = run_sums(job, 3, REVBIFPN_BEST_KERNEL(statistics_units, T));
    for (int64_t c = 0; c < channels; ++c) {
      const Moments moments = moments_of(job, c);
      const bool is_empty = moments.count == 0;
      const long double var = moments.spread / moments.count; // NaN if empty
      data_of<Acc>(mean)[c] = static_cast<Acc>(moments.sum / moments.count);
      data_of<Acc>(invstd)[c] = static_cast<Acc>(1 / std::sqrt(var + eps));
      const long double unbiased = moments.spread / (moments.count - 1);
      if (running_means != nullptr && !is_empty)
        update(running_means[c], moments.mean, momentum);
      if (running_vars != nullptr && !is_empty)
        update(running_vars[c], unbiased, momentum);
    }
  });
  if (batches)
    *data_of<int64_t>(*batches) += 1;
  return {mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
batch_norm_factors_cpu(const Tensor &x, const OptionalTensor &weight, const OptionalTensor &bias,
                       double eps, const OptionalTensor &running_mean,
                       const OptionalTensor &running_var, const OptionalTensor &batches,
                       double momentum) {
  const auto [mean, invstd] =
      batch_statistics_cpu(x, eps, running_mean, running_var, batches, momentum);
  const auto [scale, shift] = norm_factors_cpu(mean, invstd, weight, bias, std::nullopt, 1);
  return {mean, invstd, scale, shift};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics_cpu));
  m.impl("batch_norm_factors", TORCH_BOX(&batch_norm_factors_cpu));
}

} // namespace revbifpn
