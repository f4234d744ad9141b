// The gradient of y = act(norm(x)) * gate on CPUs, in two passes: sums, then dx. Kernel: walk.h,
// with the steps GradSums and NormGrad.

#include "norm_act.h"

namespace revbifpn {

Tensor norm_act_sums_cpu(const Tensor &grad_given, const Tensor &x_given, const Tensor &mean,
                         const Tensor &invstd, const OptionalTensor &weight,
                         const OptionalTensor &bias, const std::string &act, bool gated) {
  const char *op = "norm_act_sums";
  const Tensor x = walked(op, x_given);
  const Tensor grad = walked_grad(op, grad_given, x);
  const int64_t count = gated ? 5 : 2;
  const Tensor result = new_sums(op, x, {count, x.size(0), x.size(1)});
  with_norm(op, x, {mean, invstd, weight, bias, act}, [&]<class T>(auto &job) {
    job.grad = walked_maps(op, grad);
    const auto sums = run_sums(job, count,
                               gated ? REVBIFPN_BEST_KERNEL(gated_sums_units, T)
                                     : REVBIFPN_BEST_KERNEL(plain_sums_units, T));
    for (int64_t k = 0; k < count; ++k)
      add_units_up(job, k, 1.0, data_of<accumulator_t<T>>(result) + k * job.planes());
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

/// Each pixel's share of the gradient of squeeze-excite's means, which `job` then points to.
template <class Acc> struct GradMeans {
  std::vector<Acc> shares;

  GradMeans(const char *op, NormJob<Acc> &job, const OptionalTensor &grad_means) {
    const Acc *given = values_of<Acc>(op, "grad_means", grad_means, job.planes());
    if (given == nullptr)
      return;
    for (int64_t plane = 0; plane < job.planes(); ++plane)
      shares.push_back(given[plane] / static_cast<Acc>(job.pixels));
    job.grad_mean = shares.data();
  }
};

template <class T, class Acc>
void run_grad(const char *op, NormJob<Acc> &job, const Tensor &grad, const Tensor &dx) {
  job.grad = walked_maps(op, grad);
  job.y = walked_maps(op, dx);
  run(job, REVBIFPN_BEST_KERNEL(norm_grad_units, T), {FreshMemory(dx)});
}

} // namespace

std::tuple<Tensor, Tensor, Tensor>
norm_act_grad_cpu(const Tensor &grad_given, const Tensor &x_given, const Tensor &mean,
                  const Tensor &invstd, const OptionalTensor &weight, const OptionalTensor &bias,
                  const OptionalTensor &gate, const OptionalTensor &grad_means,
                  const OptionalTensor &sums_given, const std::string &act, bool is_batch) {
  const char *op = "norm_act_grad";
  const Tensor x = walked(op, x_given);
  const Tensor grad = walked_grad(op, grad_given, x);
  const OptionalTensor sums = sums_given ? sums_given
                                         : norm_act_sums_cpu(grad, x, mean, invstd, weight, bias,
                                                             act, grad_means.has_value());
  const int64_t images = x.size(0), channels = x.size(1), planes = images * channels;
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor dweight = new_sums(op, x, {channels}), dbias = new_sums(op, x, {channels});
  with_norm(op, x, {mean, invstd, weight, bias, act}, [&]<class T>(auto &job) {
    using Acc = accumulator_t<T>;
    const GradMeans<Acc> of_means(op, job, grad_means);
    job.gate = values_of<Acc>(op, "gate", gate, planes);
    const Acc *all = values_of<Acc>(op, "sums", sums, (job.grad_mean == nullptr ? 2 : 5) * planes);
    const Totals<Acc> totals = {all, job.gate, job.grad_mean, images, channels};
    const double count = static_cast<double>(images * job.pixels);
    std::vector<Acc> offset(channels), tilt(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const auto [first, second] = totals.of(c);
      const double inverse = job.invstd[c];
      data_of<Acc>(dbias)[c] = static_cast<Acc>(first);
      data_of<Acc>(dweight)[c] = images == 0 ? Acc{0} : static_cast<Acc>(second * inverse);
      offset[c] = is_batch ? static_cast<Acc>(first / count) : Acc{0};
      tilt[c] = is_batch ? static_cast<Acc>(second * inverse * inverse / count) : Acc{0};
    }
    job.offset = offset.data();
    job.tilt = tilt.data();
    run_grad<T>(op, job, grad, dx);
  });
  return {laid_out_like(x_given, dx), dweight, dbias};
}

Tensor norm_act_input_grad_cpu(const Tensor &grad_given, const Tensor &x_given, const Tensor &mean,
                               const Tensor &invstd, const OptionalTensor &weight,
                               const OptionalTensor &bias, const OptionalTensor &gate,
                               const OptionalTensor &grad_means, const Tensor &mean_dweight,
                               const Tensor &mean_dbias, const std::string &act) {
  const char *op = "norm_act_input_grad";
  const Tensor x = walked(op, x_given);
  const Tensor grad = walked_grad(op, grad_given, x);
  const int64_t channels = x.size(1);
  const Tensor dx = torch::stable::empty_like(x);
  with_norm(op, x, {mean, invstd, weight, bias, act}, [&]<class T>(auto &job) {
    using Acc = accumulator_t<T>;
    const GradMeans<Acc> of_means(op, job, grad_means);
    job.gate = values_of<Acc>(op, "gate", gate, job.planes());
    const Acc *dweight = values_of<Acc>(op, "mean_dweight", mean_dweight, channels);
    std::vector<Acc> tilt(channels);
    for (int64_t c = 0; c < channels; ++c)
      tilt[c] = dweight[c] * job.invstd[c];
    job.offset = values_of<Acc>(op, "mean_dbias", mean_dbias, channels);
    job.tilt = tilt.data();
    run_grad<T>(op, job, grad, dx);
  });
  return laid_out_like(x_given, dx);
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("norm_act_sums", TORCH_BOX(&norm_act_sums_cpu));
  m.impl("norm_act_grad", TORCH_BOX(&norm_act_grad_cpu));
  m.impl("norm_act_input_grad", TORCH_BOX(&norm_act_input_grad_cpu));
}

} // namespace revbifpn
