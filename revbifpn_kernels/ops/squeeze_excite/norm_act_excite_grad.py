"""The gradient of y = act(z) · gates(means of act(z)), z a norm of x, in one call.

Equal to `norm_act_sums`, `squeeze_excite_gates_backward` and `norm_act_grad` one after the other.
On GPUs it takes three launches if squeeze-excite's weights are small (`is_small` in image.py):

1. the sums over each image; the last program of an image also computes the gradients of its gates
   and means,
2. the gradients of all parameters,
3. dx.

The gates must come from our own operators: the slope of hardsigmoid is computed from their values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_like
from ..direct import direct_op
from ..launch import Launch, run_all
from ..library import library
from ..norm_act.arguments import NORM, check_norm
from ..norm_act.gradient import (
    gate_operands,
    norm_act_grad_cuda,
    plan_dx,
    store_totals,
    total_operands,
)
from ..norm_act.kernels import COUNTS
from ..norm_act.sums import OF_GATES, norm_act_sums_cuda, plan_norm_act_sums, store_sums
from ..norm_act.tiles import (
    CHANNELS_OF_TOTALS,
    empty_result,
    filled,
    image_counters,
    in_planes,
    norm_operands,
)
from .gates import (
    NETWORK,
    check_network,
    dense,
    network_operands,
    plan_products,
    squeeze_excite_gates_backward_cuda,
)
from .image import add_chunks, gradient_of_image, image_constants, images_to_finish, is_small
from .kernels import weight_gradient


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_excite_sums_kernel(
    sums_ptr, parts_ptr, counters_ptr, grad_means_ptr, values_ptr, grad_before_ptr,
    grad_ptr, grad_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    gate_ptr, means_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr, hidden,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr, GATED: tl.constexpr,
    SQUEEZE_ACT: tl.constexpr, HIDDEN: tl.constexpr, TERMS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Sums (5, N, C), grad_means (N, C); values and grad_before (N, hidden), for the weights'.

    Where chunks share planes, `parts_ptr` (chunks, 5, N, C) has their sums.
    """
    store_sums(
        sums_ptr if parts_ptr is None else parts_ptr, grad_ptr, grad_strides, x_ptr, x_strides,
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, N, C, pixels, blocks, chunks, images, chunk,
        ACT, GATED, UNIT, CHANNELS, PIXELS, CHANNELS_LAST,
    )  # fmt: skip
    C = C * UNIT if CHANNELS_LAST else C
    n_first, n_end = images_to_finish(counters_ptr, blocks, chunks, images, N)
    for n in range(n_first, n_end):
        if parts_ptr is not None:
            add_chunks(sums_ptr, parts_ptr, n, N, C, chunks, 5)
        gradient_of_image(
            grad_means_ptr, values_ptr, grad_before_ptr, sums_ptr + 4 * N.to(tl.int64) * C,
            gate_ptr, means_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr,
            n, C, hidden, SQUEEZE_ACT, HIDDEN, TERMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_excite_results_kernel(
    dweight_ptr, dbias_ptr, grad_reduce_ptr, grad_reduce_bias_ptr, grad_expand_ptr,
    grad_expand_bias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share,
    grad_before_ptr, grad_gates_ptr, means_ptr, values_ptr, N, C, hidden,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The gradients of parameters: blocks of dweight and dbias, then tiles of two products."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    tiles_reduce = tl.cdiv(hidden, ROWS) * tl.cdiv(C, COLUMNS)
    if pid < blocks:
        store_totals(
            dweight_ptr, dbias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share, pid,
            N, C, CHANNELS, TERMS,
        )  # fmt: skip
    elif pid < blocks + tiles_reduce:
        weight_gradient(
            grad_reduce_ptr, grad_reduce_bias_ptr, pid - blocks, grad_before_ptr, None, means_ptr,
            N, hidden, C, ROWS, COLUMNS, TERMS,
        )  # fmt: skip
    else:
        weight_gradient(
            grad_expand_ptr, grad_expand_bias_ptr, pid - blocks - tiles_reduce, grad_gates_ptr,
            gate_ptr, values_ptr, N, C, hidden, ROWS, COLUMNS, TERMS,
        )  # fmt: skip


def plan_norm_act_excite_grad(
    dx, dweight, dbias, grads, grad, x, norm, gate, means, network, act, squeeze_act, is_batch
) -> list[tuple[Launch, dict]]:
    """The three launches for a small network, whose gradients are `grads`; planes are dense."""
    first, operands, parts = plan_norm_act_sums(
        grad, x, *norm, act, True, _norm_act_excite_sums_kernel,
        SQUEEZE_ACT=squeeze_act, **image_constants(network[0]),
    )  # fmt: skip
    sums = parts[0] if len(parts) == 1 else torch.empty_like(parts[0])
    N, C, hidden = *means.shape, len(network[0])
    grad_means, values, grad_before = (means.new_empty(N, size) for size in (C, hidden, hidden))
    weights = network_operands(*network)
    operands |= {name: weights[name] for name in ("reduce_ptr", "reduce_bias_ptr", "expand_ptr")}
    operands |= {
        "sums_ptr": sums,
        "parts_ptr": None if len(parts) == 1 else parts,
        "counters_ptr": image_counters(first, x.device),
        "grad_means_ptr": grad_means,
        "values_ptr": values,
        "grad_before_ptr": grad_before,
        "gate_ptr": gate,
        "means_ptr": means,
        "hidden": hidden,
    }
    inputs = {"means": means, "values": values}
    inputs |= {"grad_before": grad_before, "grad_gates": sums[OF_GATES]}
    names = "grad_reduce", "grad_reduce_bias", "grad_expand", "grad_expand_bias"
    second, of_network = plan_products(
        _norm_act_excite_results_kernel, [(hidden, C), (C, hidden)], (N, C, hidden),
        programs=triton.cdiv(C, CHANNELS_OF_TOTALS), constants={"CHANNELS": CHANNELS_OF_TOTALS},
        **dict(zip(names, grads, strict=True)), **inputs,
    )  # fmt: skip
    norm, gates = norm_operands(*norm), gate_operands(x, gate, grad_means)
    of_norm = total_operands(dweight, dbias, sums, norm)
    return [
        (first, operands),
        (second, {**of_network, **of_norm, **gates}),
        plan_dx(dx, dweight, dbias, grad, x, norm, gates, act, is_batch),
    ]


def _one_after_the_other(grad, x, *rest) -> tuple[Tensor, ...]:
    """The gradients by the ops that this one is made of."""
    *norm, gate, means, reduce, reduce_bias, expand, expand_bias, act, squeeze_act, is_batch = rest
    sums = norm_act_sums_cuda(grad, x, *norm, act, True)
    grad_means, *grads = squeeze_excite_gates_backward_cuda(
        sums[OF_GATES], means, reduce, reduce_bias, expand, expand_bias, squeeze_act
    )
    return *norm_act_grad_cuda(grad, x, *norm, gate, grad_means, sums, act, is_batch), *grads


def norm_act_excite_grad_cuda(
    grad, x, mean, invstd, weight, bias, gate, means, *rest
) -> tuple[Tensor, ...]:
    *network, act, squeeze_act, is_batch = rest
    norm = mean, invstd, weight, bias
    if not is_small(network[0]) or x.numel() == 0:
        return _one_after_the_other(grad, x, *norm, gate, means, *rest)
    result, dx = empty_result(x)
    x, grad = in_planes(x, grad)
    gate, means, *network = dense(gate, means, *network)
    of_norm = torch.empty_like(mean), torch.empty_like(mean)
    grads = [torch.empty_like(values) for values in network]
    options = act, squeeze_act, is_batch
    arguments = dx, *of_norm, grads, grad, x, norm, gate, means, network, *options
    run_all(plan_norm_act_excite_grad(*arguments), x.device)
    return filled(result, dx), *of_norm, *grads


# Returns the gradients of x, weight and bias, then of the network's parameters.
# The CPU's kernel is registered in csrc/squeeze_excite/gates.cpp.
library.define(
    f"norm_act_excite_grad(Tensor grad, {NORM}, Tensor gate, {NETWORK}, str squeeze_act, "
    "bool is_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.impl("norm_act_excite_grad", norm_act_excite_grad_cuda, "CUDA")
norm_act_excite_grad = direct_op("norm_act_excite_grad", norm_act_excite_grad_cuda)


@torch.library.register_fake("revbifpn::norm_act_excite_grad", lib=library)
def _norm_act_excite_grad_fake(grad, x, mean, invstd, weight, bias, gate, means, *rest):
    *network, act, squeeze_act, _ = rest
    op = "norm_act_excite_grad"
    check_norm(op, x, mean, invstd, weight, bias, act, gate=gate, means=means)
    check_like(op, "grad", grad, "x", x)
    check_network(op, means, *network, squeeze_act)
    dx, *of_channels = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    return dx, *of_channels, *(means.new_empty(values.shape) for values in network)
