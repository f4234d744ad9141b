// What the operators of batch norm, activation and gate share: maps that the kernels can walk over,
// the job of a norm, and the reduction of its sums over the units.

#pragma once

#include <tuple>

#include "../common.h"

namespace revbifpn {

// Elements per chunk: it fits a core's second-level cache together with its gradient and result.
constexpr int64_t CHUNK_SIZE = 32768;
constexpr int64_t SHORTEST_CHUNK = 64, LONGEST_CHUNK = 1024;

inline Act act_of(const char *op, const std::string &act) {
  if (act == "identity")
    return Act::identity;
  if (act == "relu")
    return Act::relu;
  if (act == "hardswish")
    return Act::hardswish;
  STD_TORCH_CHECK(act == "silu", op, ": act must be identity, relu, hardswish or silu, got ", act);
  return Act::silu;
}

/// Scale and shift (samples, C) of a norm and of the factors `kept` (samples,) of stochastic depth.
std::tuple<Tensor, Tensor> norm_factors_cpu(const Tensor &mean, const Tensor &invstd,
                                            const OptionalTensor &weight,
                                            const OptionalTensor &bias, const OptionalTensor &kept,
                                            int64_t samples);

/// An unwritten tensor for sums over maps of x's dtype.
inline Tensor new_sums(const char *op, const Tensor &x, const std::vector<int64_t> &shape) {
  return new_tensor(x, shape, sums_type(dtype_of(op, x.scalar_type())));
}

/// Whether all pixels of a plane lie at the same distance, with channels (or else pixels) side by
/// side, so that the kernels can walk over them.
inline bool can_be_walked(const Tensor &tensor, bool lanes_are_channels) {
  const int64_t height = tensor.size(2), width = tensor.size(3);
  const int64_t pitch = width > 1 ? tensor.stride(3) : tensor.stride(2);
  if (height > 1 && width > 1 && tensor.stride(2) != width * pitch)
    return false;
  if (lanes_are_channels)
    return tensor.stride(1) == 1 || tensor.size(1) == 1;
  return pitch == 1 || height * width == 1;
}

inline bool has_lanes_of_channels(const Tensor &tensor) {
  return tensor.stride(1) == 1 && (tensor.size(1) > 1 || is_channels_last(tensor));
}

/// The tensor, copied if it cannot be walked that way.
inline Tensor walked(const Tensor &tensor, bool lanes_are_channels) {
  if (can_be_walked(tensor, lanes_are_channels))
    return tensor;
  return torch::stable::contiguous(tensor, lanes_are_channels ? MemoryFormat::ChannelsLast
                                                              : MemoryFormat::Contiguous);
}

inline Tensor walked(const char *op, const Tensor &x) {
  maps_of(op, x); // checks
  return walked(x, has_lanes_of_channels(x));
}

/// The gradient of a result of x's shape, copied if it cannot be walked as x is.
inline Tensor walked_grad(const char *op, const Tensor &grad, const Tensor &x) {
  check_like(op, "grad", grad, "x", x);
  return walked(grad, has_lanes_of_channels(x));
}

/// `result`, laid out as `empty_like(given)` is.
inline Tensor laid_out_like(const Tensor &given, const Tensor &result) {
  Tensor like = torch::stable::empty_like(given);
  for (int64_t side = 0; side < 4; ++side)
    if (given.size(side) > 1 && like.stride(side) != result.stride(side))
      return torch::stable::copy_(like, result);
  return result;
}

inline Maps walked_maps(const char *op, const Tensor &tensor) {
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

/// The norm of each channel and the activation after it.
struct NormArguments {
  const Tensor &mean, &invstd;
  const OptionalTensor &weight, &bias;
  const std::string &act;
};

/// Calls `function` with x's element type and the job of its norm.
template <class Function>
void with_norm(const char *op, const Tensor &x, const NormArguments &norm, Function &&function) {
  dispatch_dtype(maps_of(op, x).dtype, [&]<class T>() {
    using Acc = accumulator_t<T>;
    NormJob<Acc> job = job_of<Acc>(op, x);
    job.mean = values_of<Acc>(op, "mean", norm.mean, job.channels);
    job.invstd = values_of<Acc>(op, "invstd", norm.invstd, job.channels);
    job.weight = values_of<Acc>(op, "weight", norm.weight, job.channels);
    job.bias = values_of<Acc>(op, "bias", norm.bias, job.channels);
    job.act = act_of(op, norm.act);
    function.template operator()<T>(job);
  });
}

template <class Acc> using NormKernel = void (*)(const NormJob<Acc> &, int64_t, int64_t, double *);

template <class Acc>
void run(const NormJob<Acc> &job, NormKernel<Acc> kernel,
         const std::vector<FreshMemory> &fresh = {}) {
  run_units(job, job.units(), job.planes() * job.pixels, kernel, fresh);
}

/// Runs a kernel that fills `count` sums per unit and channel, which `job` then points to.
template <class Acc>
std::vector<double> run_sums(NormJob<Acc> &job, int64_t count, NormKernel<Acc> kernel) {
  std::vector<double> sums(count * job.units() * job.width());
  job.sums = sums.data();
  run(job, kernel);
  return sums;
}

/// (N, C) from the sums of the units, in their order.
template <class Acc> void add_units_up(const NormJob<Acc> &job, int64_t k, double scale, Acc *out) {
  const int64_t chunks = job.chunks();
  for (int64_t n = 0; n < job.images; ++n)
    for (int64_t c = 0; c < job.channels; ++c) {
      long double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum += job.sum_of(k, n, c, chunk);
      out[n * job.channels + c] = static_cast<Acc>(sum * scale);
    }
}

Tensor norm_act_means_cpu(const Tensor &x, const Tensor &mean, const Tensor &invstd,
                          const OptionalTensor &weight, const OptionalTensor &bias,
                          const std::string &act);

Tensor norm_act_sums_cpu(const Tensor &grad, const Tensor &x, const Tensor &mean,
                         const Tensor &invstd, const OptionalTensor &weight,
                         const OptionalTensor &bias, const std::string &act, bool gated);

std::tuple<Tensor, Tensor, Tensor>
norm_act_grad_cpu(const Tensor &grad, const Tensor &x, const Tensor &mean, const Tensor &invstd,
                  const OptionalTensor &weight, const OptionalTensor &bias,
                  const OptionalTensor &gate, const OptionalTensor &grad_means,
                  const OptionalTensor &sums, const std::string &act, bool is_batch);

} // namespace revbifpn
