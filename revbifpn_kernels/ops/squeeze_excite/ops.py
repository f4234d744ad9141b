"""Squeeze-excite's gates from the means of its maps, and their gradient, each in one op.

    hidden = act(means · reduceᵀ + reduce_bias)
    gates = hardsigmoid(hidden · expandᵀ + expand_bias)

means, gates (N, C); the weights (hidden, C, 1, 1) and (C, hidden, 1, 1) are 1×1 convolutions'.
Composed of PyTorch's operators, gates are 4 calls and their gradient 11, on numbers that fit a
cache: calls are most of the time. Nothing but the means is needed for the gradient: hidden values
and logits are made again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..checks import check_float64_is_on_cpu, check_values
from ..launch import Launch
from ..library import library
from ..norm_act.launchers import LAUNCHERS as NORM_LAUNCHERS
from ..norm_act.ops import ACTIVATIONS, NORM, OF_GATES, check_gate, check_grad, check_norm
from ..tiling import BLOCK
from .kernels import (
    _excite_backward_kernel,
    _excite_kernel,
    _squeeze_backward_kernel,
    _squeeze_excite_results_kernel,
    _squeeze_kernel,
)

# A tile of a product, and the terms that are loaded at once. By count: not yet tuned on a GPU.
ROWS, COLUMNS, TERMS = 16, 16, 64


def squeeze_excite_gates_reference(
    means: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    act: str = "identity",
) -> Tensor:
    """The specification of the gates in plain PyTorch."""
    hidden = ACTIVATIONS[act](F.linear(means, reduce_weight.flatten(1), reduce_bias))
    return F.hardsigmoid(F.linear(hidden, expand_weight.flatten(1), expand_bias))


def squeeze_excite_gates_backward_reference(
    grad_gates: Tensor,
    means: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    act: str = "identity",
) -> tuple[Tensor, ...]:
    """The specification of the gradients of means and parameters, by autograd."""
    inputs = means, reduce_weight, reduce_bias, expand_weight, expand_bias
    with torch.enable_grad():
        leaves = [values.detach().requires_grad_() for values in inputs]
        return torch.autograd.grad(squeeze_excite_gates_reference(*leaves, act), leaves, grad_gates)


def _plan(kernel: Any, sides: Sequence[tuple[int, int]], sizes: tuple[int, int, int], **constants):
    """The launch of a kernel whose results have these sides."""
    tiles = sum(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS) for rows, columns in sides)
    args = dict(zip(("N", "C", "hidden"), sizes, strict=True))
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "TERMS": TERMS}
    return Launch(kernel, (tiles,), args, {**constants, **tile}, threads=BLOCK)


def plan_squeeze_excite_gates(
    gates, values, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act
) -> list[tuple[Launch, dict]]:
    """The launches that write hidden values, then gates; all tensors are contiguous."""
    sizes = N, C, hidden = *means.shape, len(reduce_bias)
    squeeze = {"before_ptr": None, "means_ptr": means, "weight_ptr": reduce_weight}
    excite = {"gates_ptr": gates, "weight_ptr": expand_weight, "bias_ptr": expand_bias}
    return [
        (
            _plan(_squeeze_kernel, [(N, hidden)], sizes, ACT=act),
            {"values_ptr": values, "bias_ptr": reduce_bias, **squeeze},
        ),
        (_plan(_excite_kernel, [(N, C)], sizes), {"values_ptr": values, **excite}),
    ]


def plan_squeeze_excite_gates_backward(
    grads, scratch, grad_gates, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act
) -> list[tuple[Launch, dict]]:
    """The launches that write the gradients, in the arguments' order; all tensors are contiguous.

    Four: each result sums up the whole one before it. `scratch` is what lies between them.
    """
    sizes = N, C, hidden = *means.shape, len(reduce_bias)
    values, before, grad_before, grad_logits = scratch
    names = "means", "reduce", "reduce_bias", "expand", "expand_bias"
    results = {f"grad_{name}_ptr": grad for name, grad in zip(names, grads, strict=True)}
    sides = [(N, C), (hidden, C), (C, hidden)]
    squeeze = {"values_ptr": values, "before_ptr": before, "means_ptr": means}
    excite = {"grad_logits_ptr": grad_logits, "grad_gates_ptr": grad_gates, "values_ptr": values}
    return [
        (
            _plan(_squeeze_kernel, [(N, hidden)], sizes, ACT=act),
            {**squeeze, "weight_ptr": reduce_weight, "bias_ptr": reduce_bias},
        ),
        (
            _plan(_excite_backward_kernel, [(N, C)], sizes),
            {**excite, "weight_ptr": expand_weight, "bias_ptr": expand_bias},
        ),
        (
            _plan(_squeeze_backward_kernel, [(N, hidden)], sizes, ACT=act),
            {
                "grad_before_ptr": grad_before,
                "grad_logits_ptr": grad_logits,
                "before_ptr": before,
                "expand_ptr": expand_weight,
            },
        ),
        (
            _plan(_squeeze_excite_results_kernel, sides, sizes),
            {
                **results,
                "grad_before_ptr": grad_before,
                "grad_logits_ptr": grad_logits,
                "means_ptr": means,
                "values_ptr": values,
                "reduce_ptr": reduce_weight,
            },
        ),
    ]


def _squeeze_excite_gates_cuda(means, *network) -> Tensor:
    means, *parameters, act = *_dense(means, *network[:4]), network[4]
    gates, values = torch.empty_like(means), means.new_empty(len(means), len(parameters[1]))
    for launch, operands in plan_squeeze_excite_gates(gates, values, means, *parameters, act):
        launch.run(means.device, operands)
    return gates


def _squeeze_excite_gates_backward_cuda(grad_gates, means, *network) -> tuple[Tensor, ...]:
    grad_gates, means, *parameters = _dense(grad_gates, means, *network[:4])
    grads = tuple(torch.empty_like(values) for values in (means, *parameters))
    scratch = [means.new_empty(len(means), len(parameters[1])) for _ in range(3)]
    scratch.append(torch.empty_like(means))
    planned = plan_squeeze_excite_gates_backward(
        grads, scratch, grad_gates, means, *parameters, network[4]
    )
    for launch, operands in planned:
        launch.run(means.device, operands)
    return grads


def _norm_act_excite_grad_cuda(
    grad, x, mean, invstd, weight, bias, gate, means, *rest
) -> tuple[Tensor, ...]:
    *parameters, act, squeeze_act, is_batch = rest
    norm = grad, x, mean, invstd, weight, bias
    sums = NORM_LAUNCHERS["norm_act_sums"](*norm, act, True)
    grad_means, *grads = _squeeze_excite_gates_backward_cuda(
        sums[OF_GATES], means, *parameters, squeeze_act
    )
    own = NORM_LAUNCHERS["norm_act_grad"](*norm, gate, grad_means, sums, act, is_batch)
    return *own, *grads


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Each tensor with its elements one after the other, and the strides of that."""
    return [tensor.contiguous().view(-1).view(tensor.shape) for tensor in tensors]


# Key CPU: csrc/squeeze_excite/gates.cpp.
_NETWORK = (
    "Tensor means, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, "
    "Tensor expand_bias, str act"
)
library.define(f"squeeze_excite_gates({_NETWORK}) -> Tensor")
# The gradients of means, reduce_weight, reduce_bias, expand_weight and expand_bias.
library.define(
    f"squeeze_excite_gates_backward(Tensor grad_gates, {_NETWORK})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# The gradient of y = act(z) · gates(means of act(z)) in one call: of x, weight and bias, as in
# `norm_act_grad`, then of the network's parameters.
library.define(
    f"norm_act_excite_grad(Tensor grad, {NORM}, Tensor gate, {_NETWORK}, str squeeze_act, "
    "bool is_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LAUNCHERS = {
    "norm_act_excite_grad": _norm_act_excite_grad_cuda,
    "squeeze_excite_gates": _squeeze_excite_gates_cuda,
    "squeeze_excite_gates_backward": _squeeze_excite_gates_backward_cuda,
}
for _name, _launcher in LAUNCHERS.items():
    library.impl(_name, _launcher, "CUDA")


def _check(op: str, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act) -> None:
    if means.dim() != 2:
        raise ValueError(f"{op}: means must have shape (N, C), got {tuple(means.shape)}")
    if means.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: means must be float32 or float64, got {means.dtype}")
    check_float64_is_on_cpu(op, means)
    channels, hidden = means.shape[1], reduce_bias.numel()
    shapes = (
        ("reduce_weight", reduce_weight, (hidden, channels, 1, 1)),
        ("reduce_bias", reduce_bias, (hidden,)),
        ("expand_weight", expand_weight, (channels, hidden, 1, 1)),
        ("expand_bias", expand_bias, (channels,)),
    )
    for name, values, shape in shapes:
        check_values(op, name, values, (shape, means.dtype, means.device))
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {tuple(ACTIVATIONS)}, got {act!r}")


@torch.library.register_fake("revbifpn::squeeze_excite_gates", lib=library)
def _squeeze_excite_gates_fake(means, *network):
    _check("squeeze_excite_gates", means, *network)
    return means.new_empty(means.shape)


@torch.library.register_fake("revbifpn::squeeze_excite_gates_backward", lib=library)
def _squeeze_excite_gates_backward_fake(grad_gates, means, *network):
    op = "squeeze_excite_gates_backward"
    _check(op, means, *network)
    check_values(op, "grad_gates", grad_gates, (tuple(means.shape), means.dtype, means.device))
    return tuple(means.new_empty(values.shape) for values in (means, *network[:4]))


@torch.library.register_fake("revbifpn::norm_act_excite_grad", lib=library)
def _norm_act_excite_grad_fake(grad, x, mean, invstd, weight, bias, gate, means, *rest):
    *network, act, squeeze_act, _ = rest
    op = "norm_act_excite_grad"
    check_norm(op, x, mean, invstd, weight, bias, act)
    check_grad(op, grad, x)
    check_gate(op, "gate", gate, x)
    check_gate(op, "means", means, x)
    _check(op, means, *network, squeeze_act)
    dx, *of_channels = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    return dx, *of_channels, *(means.new_empty(values.shape) for values in network)
