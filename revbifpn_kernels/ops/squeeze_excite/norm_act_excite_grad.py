"""The gradient of y = act(z) · gates(means of act(z)), z a norm of x, in one call.

Equal to `norm_act_sums`, `squeeze_excite_gates_backward` and `norm_act_grad` one after the other.
"""

import torch
from torch import Tensor

from ..checks import check_like
from ..library import library
from ..norm_act.arguments import NORM, check_norm
from ..norm_act.gradient import norm_act_grad_cuda
from ..norm_act.sums import OF_GATES, norm_act_sums_cuda
from .gates import NETWORK, check_network, squeeze_excite_gates_backward_cuda


def norm_act_excite_grad_cuda(
    grad, x, mean, invstd, weight, bias, gate, means, *rest
) -> tuple[Tensor, ...]:
    *parameters, act, squeeze_act, is_batch = rest
    norm = grad, x, mean, invstd, weight, bias
    sums = norm_act_sums_cuda(*norm, act, True)
    grad_means, *grads = squeeze_excite_gates_backward_cuda(
        sums[OF_GATES], means, *parameters, squeeze_act
    )
    own = norm_act_grad_cuda(*norm, gate, grad_means, sums, act, is_batch)
    return *own, *grads


# Returns the gradients of x, weight and bias, then of the network's parameters.
# The CPU's kernel is registered in csrc/squeeze_excite/gates.cpp.
library.define(
    f"norm_act_excite_grad(Tensor grad, {NORM}, Tensor gate, {NETWORK}, str squeeze_act, "
    "bool is_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.impl("norm_act_excite_grad", norm_act_excite_grad_cuda, "CUDA")


@torch.library.register_fake("revbifpn::norm_act_excite_grad", lib=library)
def _norm_act_excite_grad_fake(grad, x, mean, invstd, weight, bias, gate, means, *rest):
    *network, act, squeeze_act, _ = rest
    op = "norm_act_excite_grad"
    check_norm(op, x, mean, invstd, weight, bias, act, gate=gate, means=means)
    check_like(op, "grad", grad, "x", x)
    check_network(op, means, *network, squeeze_act)
    dx, *of_channels = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    return dx, *of_channels, *(means.new_empty(values.shape) for values in network)
