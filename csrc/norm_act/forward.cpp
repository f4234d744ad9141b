// y = act(norm(x)) * gate, and the means of act(norm(x)), on CPUs. Kernel: walk.h, with the steps
// NormAct and Means.

#include "norm_act.h"

namespace revbifpn {

Tensor norm_act_means_cpu(const Tensor &x_given, const Tensor &mean, const Tensor &invstd,
                          const OptionalTensor &weight, const OptionalTensor &bias,
                          const std::string &act) {
  const char *op = "norm_act_means";
  const Tensor x = walked(op, x_given);
  const Tensor means = new_sums(op, x, {x.size(0), x.size(1)});
  with_norm(op, x, {mean, invstd, weight, bias, act}, [&]<class T>(auto &job) {
    const auto sums = run_sums(job, 1, REVBIFPN_BEST_KERNEL(means_units, T));
    add_units_up(job, 0, 1.0 / static_cast<double>(job.pixels), data_of<accumulator_t<T>>(means));
  });
  return means;
}

namespace {

Tensor norm_act_cpu(const Tensor &x_given, const Tensor &mean, const Tensor &invstd,
                    const OptionalTensor &weight, const OptionalTensor &bias,
                    const OptionalTensor &gate, const std::string &act) {
  const char *op = "norm_act";
  const Tensor x = walked(op, x_given);
  const Tensor y = torch::stable::empty_like(x);
  with_norm(op, x, {mean, invstd, weight, bias, act}, [&]<class T>(auto &job) {
    job.gate = values_of<accumulator_t<T>>(op, "gate", gate, job.planes());
    job.y = walked_maps(op, y);
    run(job, REVBIFPN_BEST_KERNEL(norm_act_units, T), {FreshMemory(y)});
  });
  return laid_out_like(x_given, y);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act_cpu));
  m.impl("norm_act_means", TORCH_BOX(&norm_act_means_cpu));
}

} // namespace revbifpn
