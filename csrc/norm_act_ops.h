// Operators of the norm_act family that others are made of.

#pragma once

#include <tuple>

#include "sums.h"

namespace revbifpn {

Tensor norm_act_sums_cpu(const Tensor &grad, const Tensor &x, const Tensor &mean,
                         const Tensor &invstd, const OptionalTensor &weight,
                         const OptionalTensor &bias, const std::string &act, bool gated);

std::tuple<Tensor, Tensor, Tensor>
norm_act_grad_cpu(const Tensor &grad, const Tensor &x, const Tensor &mean, const Tensor &invstd,
                  const OptionalTensor &weight, const OptionalTensor &bias,
                  const OptionalTensor &gate, const OptionalTensor &grad_means,
                  const OptionalTensor &sums, const std::string &act, bool is_batch);

} // namespace revbifpn
