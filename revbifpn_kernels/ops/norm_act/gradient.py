"""The gradient of batch norm, activation and gate, in two passes over the maps.

With xc = x − mean, z = xc · invstd · weight + bias and d = g·gate + m for the result's gradient g
and m, each pixel's share of the gradient of squeeze-excite's means:

    dz = d·act′(z),  dx = invstd·weight·(dz − Σdz/M − xc·invstd²·Σ(dz·xc)/M),  M = N·H·W

`norm_act_sums` reads 2E for E elements of x, `norm_act_grad` reads 2E and writes E. Neither needs
more than x, the statistics and the gate: z and act(z) are computed again.

On GPUs each pass is one launch. In the first, the last program of a block of channels adds up the
parts of all programs to dbias = Σdz and dweight = invstd·Σ(dz·xc). With squeeze-excite, m is known
only after the sums of each plane, so a third launch between the passes adds these up. If the second
pass did so, each of its programs would read 2 to 6 sums per channel and image: with 64 images of
7×7 that is more than its part of the maps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_like, check_values
from ..direct import direct_op
from ..last_program import is_last
from ..launch import Launch, run_all
from ..library import library
from .arguments import NORM, check_norm
from .forward import norm_act_reference, per_channel
from .kernels import (
    COUNTS,
    activate_with_slope,
    load_norm,
    load_tile,
    locate,
    tile_mask,
    tile_pointers,
)
from .sums import act_and_slope, norm_act_sums_cuda
from .tiles import (
    contiguous,
    empty_result,
    filled,
    in_planes,
    norm_operands,
    plan_channels,
    plan_tiles,
    shared_channels,
)


def norm_act_grad_reference(
    grad, x, mean, invstd, weight=None, bias=None, gate=None, grad_means=None,
    act: str = "identity", is_batch: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification of dx, dweight, dbias, by autograd through the statistics."""
    with torch.enable_grad():
        leaf = x.detach().to(mean.dtype).requires_grad_()
        given = torch.ones_like(mean) if weight is None else weight
        scale = given.detach().clone().requires_grad_()
        given = torch.zeros_like(mean) if bias is None else bias
        shift = given.detach().clone().requires_grad_()
        center, spread = mean, invstd
        if is_batch:
            # invstd² = 1/(var + eps), so eps need not be known.
            var, center = torch.var_mean(leaf, (0, 2, 3), correction=0)
            spread = (var + (invstd**-2 - var.detach())).rsqrt()
        y = norm_act_reference(leaf, center, spread, scale, shift, None, act)
        grad = grad.to(mean.dtype)
        if gate is not None:
            grad = grad * gate[:, :, None, None]
        if grad_means is not None:
            grad = grad + grad_means[:, :, None, None] / y[0, 0].numel()
        dx, dweight, dbias = torch.autograd.grad(y, [leaf, scale, shift], grad)
    return dx.to(x.dtype), dweight, dbias


def norm_act_input_grad_reference(
    grad, x, mean, invstd, weight, bias, gate, grad_means, mean_dweight, mean_dbias, act: str
) -> Tensor:
    """The specification of dx where the sums of the batch are given."""
    grad, xc = grad.to(mean.dtype), x.to(mean.dtype) - mean[:, None, None]
    scale = invstd[:, None, None] * per_channel(weight, 1.0)
    _, slope = act_and_slope(xc * scale + per_channel(bias, 0.0), act)
    if gate is not None:
        grad = grad * gate[:, :, None, None]
    if grad_means is not None:
        grad = grad + grad_means[:, :, None, None] / x[0, 0].numel()
    along_x = (invstd * mean_dweight)[:, None, None]
    return (scale * (grad * slope - mean_dbias[:, None, None] - xc * along_x)).to(x.dtype)


@triton.jit
def totals_of_parts(parts_ptr, parts, c, C, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """The two sums of each channel over all parts, [CHANNELS, 1] each."""
    totals = tl.zeros([CHANNELS, PARTS], tl.float32)
    totals_x = tl.zeros([CHANNELS, PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[None, :]
        mask = (c < C) & (part < parts)
        ptr = parts_ptr + part.to(tl.int64) * C + c
        totals += tl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg")
        ptr += parts.to(tl.int64) * C
        totals_x += tl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(totals, 1, keep_dims=True), tl.sum(totals_x, 1, keep_dims=True)


@triton.jit
def store_factor_grads(dweight_ptr, dbias_ptr, invstd_ptr, c, C, total, total_x):
    invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
    tl.store(dbias_ptr + c, total, mask=c < C)
    tl.store(dweight_ptr + c, total_x * invstd, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_factor_grads_kernel(
    dweight_ptr, dbias_ptr, parts_ptr, counters_ptr, grad_ptr, grad_strides, x_ptr, x_strides,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, gate_ptr,
    N, C, pixels, blocks, chunks, images, chunk, parts, ACT: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dbias and dweight; programs that share channels leave sums in `parts_ptr` (2, parts, C)."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    sums_x = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for n in range(n_first, n_end):
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            xc = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST) - mean
            dz = load_tile(grad_ptr, grad_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            if gate_ptr is not None:
                dz *= gate
            _, slope = activate_with_slope(tl.fma(xc, scale, bias), ACT)
            dz *= slope
            sums += dz
            sums_x = tl.fma(dz, xc, sums_x)
    total, total_x = tl.sum(sums, 1, keep_dims=True), tl.sum(sums_x, 1, keep_dims=True)
    if counters_ptr is None:
        store_factor_grads(dweight_ptr, dbias_ptr, invstd_ptr, c, C, total, total_x)
    else:
        ptr = parts_ptr + (tl.program_id(0) // blocks).to(tl.int64) * C + c
        tl.store(ptr, total, mask=c < C)
        tl.store(ptr + parts.to(tl.int64) * C, total_x, mask=c < C)
        if is_last(counters_ptr, tl.program_id(0) % blocks, parts):
            total, total_x = totals_of_parts(parts_ptr, parts, c, C, CHANNELS, PARTS)
            store_factor_grads(dweight_ptr, dbias_ptr, invstd_ptr, c, C, total, total_x)


@triton.jit
def store_totals(
    dweight_ptr, dbias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share, block,
    N, C, CHANNELS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """dbias and dweight of a block of channels from the sums of all images."""
    c = block * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    size = N.to(tl.int64) * C
    totals = tl.zeros([CHANNELS, IMAGES], tl.float32)
    totals_x = tl.zeros([CHANNELS, IMAGES], tl.float32)
    for first in range(0, N, IMAGES):
        n = first + tl.arange(0, IMAGES)[None, :]
        mask = (c < C) & (n < N)
        offs = n.to(tl.int64) * C + c
        sum_g = tl.load(sums_ptr + offs, mask=mask, other=0.0)
        sum_gx = tl.load(sums_ptr + size + offs, mask=mask, other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
            sum_g *= gate
            sum_gx *= gate
        if grad_means_ptr is not None:
            extra = tl.load(grad_means_ptr + offs, mask=mask, other=0.0) * share
            sum_s = tl.load(sums_ptr + 2 * size + offs, mask=mask, other=0.0)
            sum_sx = tl.load(sums_ptr + 3 * size + offs, mask=mask, other=0.0)
            sum_g = tl.fma(extra, sum_s, sum_g)
            sum_gx = tl.fma(extra, sum_sx, sum_gx)
        totals += sum_g
        totals_x += sum_gx
    total, total_x = tl.sum(totals, 1, keep_dims=True), tl.sum(totals_x, 1, keep_dims=True)
    store_factor_grads(dweight_ptr, dbias_ptr, invstd_ptr, c, C, total, total_x)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_totals_kernel(
    dweight_ptr, dbias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share,
    N, C, CHANNELS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    store_totals(
        dweight_ptr, dbias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share,
        tl.program_id(0), N, C, CHANNELS, IMAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_grad_kernel(
    dx_ptr, dx_strides, grad_ptr, grad_strides, x_ptr, x_strides,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, gate_ptr, grad_means_ptr, dweight_ptr, dbias_ptr,
    share, inverse_count, N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx; the statistics are constants where dweight_ptr and dbias_ptr are None."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    if dbias_ptr is not None:
        mean_dz = tl.load(dbias_ptr + c, mask=c < C, other=0.0) * inverse_count
        invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
        along_x = tl.load(dweight_ptr + c, mask=c < C, other=0.0) * invstd * inverse_count
    for n in range(n_first, n_end):
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        if grad_means_ptr is not None:
            extra = tl.load(grad_means_ptr + n * C + c, mask=c < C, other=0.0) * share
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            xc = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST) - mean
            grad = load_tile(grad_ptr, grad_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            if gate_ptr is not None:
                grad *= gate
            if grad_means_ptr is not None:
                grad += extra
            _, slope = activate_with_slope(tl.fma(xc, scale, bias), ACT)
            dz = grad * slope
            if dbias_ptr is not None:
                dz = tl.fma(-xc, along_x, dz - mean_dz)
            ptr = tile_pointers(dx_ptr, dx_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            tl.store(ptr, (dz * scale).to(dx_ptr.dtype.element_ty), mask=mask)


def plan_factor_grads(dweight, dbias, grad, x, norm, gate, act) -> tuple[Launch, dict]:
    """The launch that writes dweight and dbias from the maps."""
    launch = plan_tiles(_norm_act_factor_grads_kernel, {"grad": grad, "x": x}, "channel", ACT=act)
    operands = {"dweight_ptr": dweight, "dbias_ptr": dbias, **shared_channels(launch, 2, x)}
    return launch, {**operands, "grad_ptr": grad, "x_ptr": x, **norm, "gate_ptr": gate}


def _plan_totals(dweight, dbias, sums, norm, gates) -> tuple[Launch, dict]:
    """The launch that writes dweight and dbias from the sums of each plane."""
    _, N, C = sums.shape
    operands = total_operands(dweight, dbias, sums, norm)
    return plan_channels(_norm_act_totals_kernel, C, {"N": N}, "IMAGES"), {**operands, **gates}


def total_operands(dweight, dbias, sums, norm) -> dict[str, Tensor]:
    """What `store_totals` takes beside the gates' operands."""
    operands = {"dweight_ptr": dweight, "dbias_ptr": dbias, "sums_ptr": sums.contiguous()}
    return operands | {"invstd_ptr": norm["invstd_ptr"]}


def gate_operands(x: Tensor, gate: Tensor | None, grad_means: Tensor | None) -> dict:
    """What the gradient of a gated norm takes beside the operands of the norm."""
    share = 1.0 / (x.shape[2] * x.shape[3])
    return {
        "gate_ptr": contiguous(gate), "grad_means_ptr": contiguous(grad_means), "share": share
    }  # fmt: skip


def plan_dx(dx, dweight, dbias, grad, x, norm, gates, act, is_batch) -> tuple[Launch, dict]:
    """The launch that writes dx, once dweight and dbias are written."""
    maps = {"dx": dx, "grad": grad, "x": x}
    launch = plan_tiles(_norm_act_grad_kernel, maps, "pixel", ACT=act)
    operands = {f"{name}_ptr": tensor for name, tensor in maps.items()} | {
        "dweight_ptr": dweight if is_batch else None,
        "dbias_ptr": dbias if is_batch else None,
        "inverse_count": 1.0 / max(1, x.numel() // x.shape[1]),
    }
    return launch, {**operands, **norm, **gates}


def plan_norm_act_grad(
    dx, dweight, dbias, grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch
) -> list[tuple[Launch, dict]]:
    """The launches that write dweight and dbias, then dx, for dense planes in x's format.

    `sums` may be None without grad_means.
    """
    norm, gates = norm_operands(mean, invstd, weight, bias), gate_operands(x, gate, grad_means)
    results = dweight, dbias
    first = (
        plan_factor_grads(*results, grad, x, norm, gates["gate_ptr"], act)
        if sums is None
        else _plan_totals(*results, sums, norm, gates)
    )
    return [first, plan_dx(dx, *results, grad, x, norm, gates, act, is_batch)]


def norm_act_grad_cuda(
    grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch
) -> tuple[Tensor, Tensor, Tensor]:
    norm = mean, invstd, weight, bias
    result, dx = empty_result(x)
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    x, grad = in_planes(x, grad)
    if sums is None and grad_means is not None:
        sums = norm_act_sums_cuda(grad, x, *norm, act, True)
    gates = gate, grad_means, sums
    planned = plan_norm_act_grad(dx, dweight, dbias, grad, x, *norm, *gates, act, is_batch)
    run_all(planned, x.device)
    if len(x) == 0:  # as in PyTorch; an empty batch's invstd is NaN
        dweight.zero_(), dbias.zero_()
    return filled(result, dx), dweight, dbias


def plan_norm_act_input_grad(
    dx, grad, x, mean, invstd, weight, bias, gate, grad_means, mean_dweight, mean_dbias, act
) -> tuple[Launch, dict]:
    """The launch that writes dx, for dense planes in x's format."""
    launch = plan_tiles(_norm_act_grad_kernel, {"dx": dx, "grad": grad, "x": x}, "pixel", ACT=act)
    return launch, {
        "dx_ptr": dx,
        "grad_ptr": grad,
        "x_ptr": x,
        **norm_operands(mean, invstd, weight, bias),
        "gate_ptr": contiguous(gate),
        "grad_means_ptr": contiguous(grad_means),
        "dweight_ptr": contiguous(mean_dweight),
        "dbias_ptr": contiguous(mean_dbias),
        "share": 1.0 / (x.shape[2] * x.shape[3]),
        "inverse_count": 1.0,
    }


def norm_act_input_grad_cuda(grad, x, *arguments) -> Tensor:
    result, dx = empty_result(x)
    x, grad = in_planes(x, grad)
    launch, operands = plan_norm_act_input_grad(dx, grad, x, *arguments)
    launch.run(x.device, operands)
    return filled(result, dx)


# The CPU's kernel is registered in csrc/norm_act/gradient.cpp.
# Returns dx, dweight and dbias. Without `is_batch` the statistics are constants. `sums` are from
# norm_act_sums, which a gate's gradient needs as well; None: they are computed here.
library.define(
    f"norm_act_grad(Tensor grad, {NORM}, Tensor? gate, Tensor? grad_means, Tensor? sums, str act, "
    "bool is_batch) -> (Tensor, Tensor, Tensor)"
)
# dx alone, where statistics are those of several processes: mean_dweight and mean_dbias are dweight
# and dbias, summed over all processes and divided by the number of values per channel.
library.define(
    f"norm_act_input_grad(Tensor grad, {NORM}, Tensor? gate, Tensor? grad_means, "
    "Tensor mean_dweight, Tensor mean_dbias, str act) -> Tensor"
)
library.impl("norm_act_grad", norm_act_grad_cuda, "CUDA")
library.impl("norm_act_input_grad", norm_act_input_grad_cuda, "CUDA")
norm_act_grad = direct_op("norm_act_grad", norm_act_grad_cuda)
norm_act_input_grad = direct_op("norm_act_input_grad", norm_act_input_grad_cuda)


@torch.library.register_fake("revbifpn::norm_act_grad", lib=library)
def _norm_act_grad_fake(grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch):
    norm, gates = (x, mean, invstd, weight, bias), {"gate": gate, "grad_means": grad_means}
    check_norm("norm_act_grad", *norm, act, **gates)
    check_like("norm_act_grad", "grad", grad, "x", x)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("revbifpn::norm_act_input_grad", lib=library)
def _norm_act_input_grad_fake(
    grad, x, mean, invstd, weight, bias, gate, grad_means, mean_dweight, mean_dbias, act
):
    given = {"gate": gate, "grad_means": grad_means}
    check_norm("norm_act_input_grad", x, mean, invstd, weight, bias, act, **given)
    check_like("norm_act_input_grad", "grad", grad, "x", x)
    for name, values in (("mean_dweight", mean_dweight), ("mean_dbias", mean_dbias)):
        expected = tuple(mean.shape), mean.dtype, mean.device
        check_values("norm_act_input_grad", name, values, expected)
    return torch.empty_like(x)
