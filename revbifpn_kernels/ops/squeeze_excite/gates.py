"""Squeeze-excite's gates from the means of its maps, and their gradient, each in one op.

    hidden = act(means · reduceᵀ + reduce_bias)
    gates = hardsigmoid(hidden · expandᵀ + expand_bias)

means, gates (N, C); the weights (hidden, C, 1, 1) and (C, hidden, 1, 1) are those of 1×1
convolutions. With PyTorch's operators the gates take 4 calls and their gradient 11, on data that
fits a cache: the calls take most of the time. The gradient needs only the means: hidden values and
logits are computed again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..checks import check_float64_is_on_cpu, check_values
from ..direct import direct_op
from ..launch import Launch, launch_of, run_all
from ..library import library
from ..norm_act.arguments import ACTIVATIONS, check_act
from ..tiling import BLOCK
from .kernels import (
    _excite_backward_kernel,
    _excite_kernel,
    _squeeze_backward_kernel,
    _squeeze_excite_results_kernel,
    _squeeze_kernel,
)

# A tile of a product, and the terms loaded at once. Counted by hand: not yet tuned on a GPU.
ROWS, COLUMNS, TERMS = 16, 16, 64


def squeeze_excite_gates_reference(
    means, reduce_weight, reduce_bias, expand_weight, expand_bias, act: str = "identity"
) -> Tensor:
    """The specification of the gates in plain PyTorch."""
    hidden = ACTIVATIONS[act](F.linear(means, reduce_weight.flatten(1), reduce_bias))
    return F.hardsigmoid(F.linear(hidden, expand_weight.flatten(1), expand_bias))


def squeeze_excite_gates_backward_reference(
    grad_gates: Tensor, *means_and_parameters: Tensor, act: str = "identity"
) -> tuple[Tensor, ...]:
    """The specification of the gradients of means and parameters, by autograd."""
    with torch.enable_grad():
        leaves = [values.detach().requires_grad_() for values in means_and_parameters]
        return torch.autograd.grad(squeeze_excite_gates_reference(*leaves, act), leaves, grad_gates)


def plan_products(
    kernel: Any, sides: Sequence[tuple[int, int]], sizes: tuple[int, int, int], act="",
    programs=0, constants=None, **operands,
) -> tuple[Launch, dict]:  # fmt: skip
    """The launch of a kernel whose results are matrices of these `sides`, and its operands.

    The first `programs` of the grid compute no tile of these matrices.
    """
    tiles = sum(triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS) for rows, columns in sides)
    args = dict(zip(("N", "C", "hidden"), sizes, strict=True))
    constants = {**({"ACT": act} if act else {}), **(constants or {})}
    constants |= {"ROWS": ROWS, "COLUMNS": COLUMNS, "TERMS": TERMS}
    launch = launch_of(kernel, (programs + tiles,), args, constants, threads=BLOCK)
    return launch, {f"{name}_ptr": tensor for name, tensor in operands.items()}


def plan_squeeze_excite_gates(
    gates, values, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act
) -> list[tuple[Launch, dict]]:
    """The launches that write hidden values, then gates; all tensors are contiguous."""
    sizes = N, C, hidden = *means.shape, len(reduce_bias)
    reduce = {"weight": reduce_weight, "bias": reduce_bias}
    expand = {"weight": expand_weight, "bias": expand_bias}
    squeeze = {"values": values, "before": None, "means": means, **reduce}
    return [
        plan_products(_squeeze_kernel, [(N, hidden)], sizes, act, **squeeze),
        plan_products(_excite_kernel, [(N, C)], sizes, gates=gates, values=values, **expand),
    ]


def plan_squeeze_excite_gates_backward(
    grads, scratch, grad_gates, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act
) -> list[tuple[Launch, dict]]:
    """The launches that write the gradients, in the arguments' order; all tensors are contiguous.

    Each of the four needs the whole result of the one before, which `scratch` holds.
    """
    sizes = N, C, hidden = *means.shape, len(reduce_bias)
    values, before, grad_before, grad_logits = scratch
    names = "means", "reduce", "reduce_bias", "expand", "expand_bias"
    results = {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}
    squeeze = {"values": values, "before": before, "means": means}
    squeeze |= {"weight": reduce_weight, "bias": reduce_bias}
    excite = {"grad_logits": grad_logits, "grad_gates": grad_gates, "values": values}
    excite |= {"weight": expand_weight, "bias": expand_bias}
    between = {"grad_before": grad_before, "grad_logits": grad_logits}
    back = {**between, "before": before, "expand": expand_weight}
    results |= {**between, "means": means, "values": values, "reduce": reduce_weight}
    sides = [(N, C), (hidden, C), (C, hidden)]
    return [
        plan_products(_squeeze_kernel, [(N, hidden)], sizes, act, **squeeze),
        plan_products(_excite_backward_kernel, [(N, C)], sizes, **excite),
        plan_products(_squeeze_backward_kernel, [(N, hidden)], sizes, act, **back),
        plan_products(_squeeze_excite_results_kernel, sides, sizes, **results),
    ]


def network_operands(*network: Tensor) -> dict[str, Tensor]:
    """Contiguous weights and biases as a kernel's operands."""
    names = "reduce_ptr", "reduce_bias_ptr", "expand_ptr", "expand_bias_ptr"
    return dict(zip(names, network, strict=True))


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied unless contiguous, with the strides of contiguous ones."""
    return [tensor.contiguous().view(-1).view(tensor.shape) for tensor in tensors]


def squeeze_excite_gates_cuda(means, *network) -> Tensor:
    means, *parameters, act = *dense(means, *network[:4]), network[4]
    gates, values = torch.empty_like(means), means.new_empty(len(means), len(parameters[1]))
    planned = plan_squeeze_excite_gates(gates, values, means, *parameters, act)
    run_all(planned, means.device)
    return gates


def squeeze_excite_gates_backward_cuda(grad_gates, means, *network) -> tuple[Tensor, ...]:
    grad_gates, means, *parameters = dense(grad_gates, means, *network[:4])
    grads = tuple(torch.empty_like(values) for values in (means, *parameters))
    scratch = [means.new_empty(len(means), len(parameters[1])) for _ in range(3)]
    scratch.append(torch.empty_like(means))
    arguments = grad_gates, means, *parameters, network[4]
    run_all(plan_squeeze_excite_gates_backward(grads, scratch, *arguments), means.device)
    return grads


# The CPU's kernel is registered in csrc/squeeze_excite/gates.cpp.
PARAMETERS = "Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias"
NETWORK = f"Tensor means, {PARAMETERS}, str act"
library.define(f"squeeze_excite_gates({NETWORK}) -> Tensor")
# The gradients of means, reduce_weight, reduce_bias, expand_weight and expand_bias.
library.define(
    f"squeeze_excite_gates_backward(Tensor grad_gates, {NETWORK})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.impl("squeeze_excite_gates", squeeze_excite_gates_cuda, "CUDA")
library.impl("squeeze_excite_gates_backward", squeeze_excite_gates_backward_cuda, "CUDA")
squeeze_excite_gates = direct_op("squeeze_excite_gates", squeeze_excite_gates_cuda)
squeeze_excite_gates_backward = direct_op(
    "squeeze_excite_gates_backward", squeeze_excite_gates_backward_cuda
)


def check_network(
    op: str, means, reduce_weight, reduce_bias, expand_weight, expand_bias, act
) -> None:
    """Raise unless gates can be computed from the means."""
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
    check_act(op, act)


@torch.library.register_fake("revbifpn::squeeze_excite_gates", lib=library)
def _squeeze_excite_gates_fake(means, *network):
    check_network("squeeze_excite_gates", means, *network)
    return means.new_empty(means.shape)


@torch.library.register_fake("revbifpn::squeeze_excite_gates_backward", lib=library)
def _squeeze_excite_gates_backward_fake(grad_gates, means, *network):
    op = "squeeze_excite_gates_backward"
    check_network(op, means, *network)
    check_values(op, "grad_gates", grad_gates, (tuple(means.shape), means.dtype, means.device))
    return tuple(means.new_empty(values.shape) for values in (means, *network[:4]))
