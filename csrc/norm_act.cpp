// Batch norm, activation and gate on CPUs: checks, plan of the work, what is left of sums when the
// units are done. Kernels: kernels/norm_act.h.

#include <cmath>
#include <tuple>

#include "norm_act_ops.h"

namespace revbifpn {
namespace {

// Elements of a chunk: it stays in a core's second-level cache with its gradient and result. Its
// pixels are added up one after the other, those of chunks in long doubles.
constexpr int64_t CHUNK_SIZE = 32768;
constexpr int64_t SHORTEST_CHUNK = 64, LONGEST_CHUNK = 1024;

/// Whether the pixels of a plane lie at one distance, channels or pixels side by side.
bool can_be_walked(const Tensor &tensor, bool lanes_are_channels) {
  const int64_t height = tensor.size(2), width = tensor.size(3);
  const int64_t pitch = width > 1 ? tensor.stride(3) : tensor.stride(2);
  if (height > 1 && width > 1 && tensor.stride(2) != width * pitch)
    return false;
  if (lanes_are_channels)
    return tensor.stride(1) == 1 || tensor.size(1) == 1;
  return pitch == 1 || height * width == 1;
}

bool has_lanes_of_channels(const Tensor &tensor) {
  return tensor.stride(1) == 1 && (tensor.size(1) > 1 || is_channels_last(tensor));
}

/// The tensor, copied if it cannot be walked that way.
Tensor walked(const Tensor &tensor, bool lanes_are_channels) {
  if (can_be_walked(tensor, lanes_are_channels))
    return tensor;
  return torch::stable::contiguous(tensor, lanes_are_channels
                                               ? torch::headeronly::MemoryFormat::ChannelsLast
                                               : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor walked(const char *op, const Tensor &x) {
  maps_of(op, x); // checks
  return walked(x, has_lanes_of_channels(x));
}

/// `result`, laid out as `empty_like(given)` is.
Tensor laid_out_like(const Tensor &given, const Tensor &result) {
  Tensor like = torch::stable::empty_like(given);
  for (int64_t side = 0; side < 4; ++side)
    if (given.size(side) > 1 && like.stride(side) != result.stride(side))
      return torch::stable::copy_(like, result);
  return result;
}

Maps walked_maps(const char *op, const Tensor &tensor) {
  Maps maps = maps_of(op, tensor);
  if (maps.width == 1)
    maps.stride_w = maps.stride_h;
  return maps;
}

template <class Acc> NormJob<Acc> job_of(const char *op, const Tensor &x) {
  NormJob<Acc> job = {};
  job.lanes_are_channels = has_lanes_of_channels(x);
  job.x = walked_maps(op, x);
  job.images = x.size(0);
  job.channels = x.size(1);
  job.pixels = job.x.height * job.x.width;
  const int64_t chunk = CHUNK_SIZE / std::max<int64_t>(1, job.width());
  job.chunk_pixels = std::clamp(chunk, SHORTEST_CHUNK, LONGEST_CHUNK);
  return job;
}

/// The norm of each channel.
template <class Acc> struct Norm {
  const Acc *mean, *invstd, *weight, *bias;

  Norm(const char *op, int64_t channels, const Tensor &mean_, const Tensor &invstd_,
       const OptionalTensor &weight_, const OptionalTensor &bias_)
      : mean(values_of<Acc>(op, "mean", mean_, channels)),
        invstd(values_of<Acc>(op, "invstd", invstd_, channels)),
        weight(values_of<Acc>(op, "weight", weight_, channels)),
        bias(values_of<Acc>(op, "bias", bias_, channels)) {}

  void put_into(NormJob<Acc> &job) const {
    job.mean = mean;
    job.invstd = invstd;
    job.weight = weight;
    job.bias = bias;
  }
};

/// Calls `function` with a value of x's element type, the job of its norm, and the norm.
template <class Function>
void with_norm(const char *op, const Tensor &x, const Tensor &mean, const Tensor &invstd,
               const OptionalTensor &weight, const OptionalTensor &bias, const std::string &act,
               Function &&function) {
  dispatch_dtype(maps_of(op, x).dtype, [&](auto element) {
    using Acc = accumulator_t<decltype(element)>;
    auto job = job_of<Acc>(op, x);
    const Norm<Acc> norm(op, job.channels, mean, invstd, weight, bias);
    norm.put_into(job);
    job.act = act_of(op, act);
    function(element, job, norm);
  });
}

template <class Job, class Kernel>
void run(const Job &job, Kernel kernel, const std::vector<FreshMemory> &fresh = {}) {
  const int64_t elements = job.images * job.channels * job.pixels;
  const int64_t step =
      std::max<int64_t>(1, job.units() * (int64_t{1} << 18) / std::max<int64_t>(1, elements));
  run_units(job, job.units(), fresh.empty() ? std::max<int64_t>(1, job.units()) : step, elements,
            fresh, kernel);
}

/// (N, C) from the sums of the units, in their order.
template <class Acc> void add_units_up(const NormJob<Acc> &job, int64_t k, double scale, Acc *out) {
  const int64_t per_image = job.lanes_are_channels ? job.chunks() : 1;
  for (int64_t n = 0; n < job.images; ++n)
    for (int64_t c = 0; c < job.channels; ++c) {
      long double sum = 0;
      for (int64_t chunk = 0; chunk < per_image; ++chunk)
        sum += job.lanes_are_channels ? job.sum(k, n * per_image + chunk, c)
                                      : job.sum(k, n * job.channels + c, 0);
      out[n * job.channels + c] = static_cast<Acc>(sum * scale);
    }
}

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

template <class Acc> Moments moments_of(const NormJob<Acc> &job, int64_t channel) {
  Moments moments;
  const int64_t per_image = job.lanes_are_channels ? job.chunks() : 1;
  for (int64_t n = 0; n < job.images; ++n)
    for (int64_t chunk = 0; chunk < per_image; ++chunk) {
      const bool is_plane = !job.lanes_are_channels;
      const int64_t unit = is_plane ? n * job.channels + channel : n * per_image + chunk;
      const int64_t c = is_plane ? 0 : channel;
      const double count = static_cast<double>(
          is_plane ? job.pixels
                   : std::min(job.chunk_pixels, job.pixels - chunk * job.chunk_pixels));
      const double difference = job.sum(0, unit, c), squares = job.sum(1, unit, c);
      moments.add(count, job.sum(2, unit, c), squares - difference * difference / count);
    }
  return moments;
}

/// A running statistic to be moved, or null.
template <class Acc>
Acc *running_of(const char *name, const OptionalTensor &tensor, int64_t channels) {
  return const_cast<Acc *>(values_of<Acc>("batch_statistics", name, tensor, channels));
}

template <class Acc> void move(Acc &running, long double value, double momentum) {
  running = static_cast<Acc>(running + momentum * (value - running));
}

std::tuple<Tensor, Tensor> batch_statistics_cpu(const Tensor &x_given, double eps,
                                                const OptionalTensor &running_mean,
                                                const OptionalTensor &running_var,
                                                const OptionalTensor &batches, double momentum) {
  const char *op = "batch_statistics";
  const Tensor x = walked(op, x_given);
  const int64_t channels = x.size(1);
  const Tensor mean = empty_sums(x, {channels}), invstd = empty_sums(x, {channels});
  STD_TORCH_CHECK(!batches || (batches->is_cpu() && batches->numel() == 1 &&
                               batches->scalar_type() == ScalarType::Long),
                  op, ": batches must be one int64");
  dispatch_dtype(maps_of(op, x).dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = accumulator_t<T>;
    auto job = job_of<Acc>(op, x);
    Acc *moved_mean = running_of<Acc>("running_mean", running_mean, channels);
    Acc *moved_var = running_of<Acc>("running_var", running_var, channels);
    std::vector<double> sums(3 * job.units() * job.width());
    job.sums = sums.data();
    run(job, REVBIFPN_BEST_KERNEL(statistics_units, T));
    for (int64_t c = 0; c < channels; ++c) {
      const Moments moments = moments_of(job, c);
      const bool is_empty = moments.count == 0;
      const long double var = moments.spread / moments.count; // NaN if empty
      static_cast<Acc *>(mean.data_ptr())[c] = static_cast<Acc>(moments.sum / moments.count);
      static_cast<Acc *>(invstd.data_ptr())[c] = static_cast<Acc>(1 / std::sqrt(var + eps));
      const long double unbiased = moments.spread / (moments.count - 1);
      if (moved_mean != nullptr && !is_empty)
        move(moved_mean[c], moments.mean, momentum);
      if (moved_var != nullptr && !is_empty)
        move(moved_var[c], unbiased, momentum);
    }
  });
  if (batches)
    *static_cast<int64_t *>(batches->data_ptr()) += 1;
  return {mean, invstd};
}

Tensor norm_act_cpu(const Tensor &x_given, const Tensor &mean, const Tensor &invstd,
                    const OptionalTensor &weight, const OptionalTensor &bias,
                    const OptionalTensor &gate, const std::string &act) {
  const char *op = "norm_act";
  const Tensor x = walked(op, x_given);
  Tensor y = torch::stable::empty_like(x);
  with_norm(op, x, mean, invstd, weight, bias, act, [&](auto element, auto &job, const auto &) {
    using T = decltype(element);
    using Acc = accumulator_t<T>;
    job.gate = values_of<Acc>(op, "gate", gate, job.images * job.channels);
    job.y = walked_maps(op, y);
    run(job, REVBIFPN_BEST_KERNEL(norm_act_units, T),
        {FreshMemory(job.y, y.numel(), y.element_size())});
  });
  return laid_out_like(x_given, y);
}

Tensor norm_act_means_cpu(const Tensor &x_given, const Tensor &mean, const Tensor &invstd,
                          const OptionalTensor &weight, const OptionalTensor &bias,
                          const std::string &act) {
  const char *op = "norm_act_means";
  const Tensor x = walked(op, x_given);
  Tensor means = empty_sums(x, {x.size(0), x.size(1)});
  with_norm(op, x, mean, invstd, weight, bias, act, [&](auto element, auto &job, const auto &) {
    using T = decltype(element);
    using Acc = accumulator_t<T>;
    std::vector<double> sums(job.units() * job.width());
    job.sums = sums.data();
    run(job, REVBIFPN_BEST_KERNEL(means_units, T));
    add_units_up(job, 0, 1.0 / static_cast<double>(job.pixels),
                 static_cast<Acc *>(means.data_ptr()));
  });
  return means;
}

} // namespace

Tensor norm_act_sums_cpu(const Tensor &grad_given, const Tensor &x_given, const Tensor &mean,
                         const Tensor &invstd, const OptionalTensor &weight,
                         const OptionalTensor &bias, const std::string &act, bool gated) {
  const char *op = "norm_act_sums";
  const Tensor x = walked(op, x_given);
  check_like(op, "grad", grad_given, "x", x);
  const Tensor grad = walked(grad_given, has_lanes_of_channels(x));
  const int64_t count = gated ? 5 : 2, planes = x.size(0) * x.size(1);
  Tensor result = empty_sums(x, {count, x.size(0), x.size(1)});
  with_norm(op, x, mean, invstd, weight, bias, act, [&](auto element, auto &job, const auto &) {
    using T = decltype(element);
    using Acc = accumulator_t<T>;
    job.grad = walked_maps(op, grad);
    std::vector<double> sums(count * job.units() * job.width());
    job.sums = sums.data();
    run(job, gated ? REVBIFPN_BEST_KERNEL(gated_sums_units, T)
                   : REVBIFPN_BEST_KERNEL(plain_sums_units, T));
    for (int64_t k = 0; k < count; ++k)
      add_units_up(job, k, 1.0, static_cast<Acc *>(result.data_ptr()) + k * planes);
  });
  return result;
}

namespace {

/// Sums over the batch of dz and dz * xc, of one channel.
template <class Acc> struct Totals {
  const Acc *sums, *gate, *grad_mean;
  int64_t images, channels;

  std::tuple<double, double> of(int64_t c) const {
    const int64_t planes = images * channels;
    double first = 0, second = 0;
    for (int64_t plane = c; plane < planes; plane += channels) {
      const double factor = gate == nullptr ? 1.0 : gate[plane];
      first += factor * sums[plane];
      second += factor * sums[planes + plane];
      if (grad_mean != nullptr) {
        first += static_cast<double>(grad_mean[plane]) * sums[2 * planes + plane];
        second += static_cast<double>(grad_mean[plane]) * sums[3 * planes + plane];
      }
    }
    return {first, second};
  }
};

} // namespace

std::tuple<Tensor, Tensor, Tensor>
norm_act_grad_cpu(const Tensor &grad_given, const Tensor &x_given, const Tensor &mean,
                  const Tensor &invstd, const OptionalTensor &weight, const OptionalTensor &bias,
                  const OptionalTensor &gate, const OptionalTensor &grad_means,
                  const OptionalTensor &sums_given, const std::string &act, bool is_batch) {
  const char *op = "norm_act_grad";
  const Tensor x = walked(op, x_given);
  check_like(op, "grad", grad_given, "x", x);
  const Tensor grad = walked(grad_given, has_lanes_of_channels(x));
  const OptionalTensor sums = sums_given ? sums_given
                                         : norm_act_sums_cpu(grad, x, mean, invstd, weight, bias,
                                                             act, grad_means.has_value());
  const int64_t images = x.size(0), channels = x.size(1), planes = images * channels;
  Tensor dx = torch::stable::empty_like(x);
  const Tensor dweight = empty_sums(x, {channels}), dbias = empty_sums(x, {channels});
  with_norm(op, x, mean, invstd, weight, bias, act, [&](auto element, auto &job, const auto &norm) {
    using T = decltype(element);
    using Acc = accumulator_t<T>;
    job.gate = values_of<Acc>(op, "gate", gate, planes);
    const Acc *given = values_of<Acc>(op, "grad_means", grad_means, planes);
    std::vector<Acc> grad_mean(given == nullptr ? 0 : planes), offset(channels), tilt(channels);
    for (size_t plane = 0; plane < grad_mean.size(); ++plane)
      grad_mean[plane] = given[plane] / static_cast<Acc>(job.pixels);
    job.grad_mean = given == nullptr ? nullptr : grad_mean.data();
    const Acc *all = values_of<Acc>(op, "sums", sums, (given == nullptr ? 2 : 5) * planes);
    const Totals<Acc> totals = {all, job.gate, job.grad_mean, images, channels};
    const double count = static_cast<double>(images * job.pixels);
    for (int64_t c = 0; c < channels; ++c) {
      const auto [first, second] = totals.of(c);
      const double inverse = norm.invstd[c];
      static_cast<Acc *>(dbias.data_ptr())[c] = static_cast<Acc>(first);
      static_cast<Acc *>(dweight.data_ptr())[c] =
          images == 0 ? Acc{0} : static_cast<Acc>(second * inverse);
      offset[c] = is_batch ? static_cast<Acc>(first / count) : Acc{0};
      tilt[c] = is_batch ? static_cast<Acc>(second * inverse * inverse / count) : Acc{0};
    }
    job.offset = offset.data();
    job.tilt = tilt.data();
    job.grad = walked_maps(op, grad);
    job.y = walked_maps(op, dx);
    run(job, REVBIFPN_BEST_KERNEL(norm_grad_units, T),
        {FreshMemory(job.y, dx.numel(), dx.element_size())});
  });
  return {laid_out_like(x_given, dx), dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("batch_statistics", TORCH_BOX(&batch_statistics_cpu));
  m.impl("norm_act", TORCH_BOX(&norm_act_cpu));
  m.impl("norm_act_means", TORCH_BOX(&norm_act_means_cpu));
  m.impl("norm_act_sums", TORCH_BOX(&norm_act_sums_cpu));
  m.impl("norm_act_grad", TORCH_BOX(&norm_act_grad_cpu));
}

} // namespace revbifpn
