"""Sums over each plane that the gradient of batch norm, activation and gate needs.

With xc = x − mean, z = xc · invstd · weight + bias and the result's gradient g: Σ g·act′(z) and
Σ g·act′(z)·xc; for a gate also Σ act′(z), Σ act′(z)·xc and Σ g·act(z), the gate's own gradient.
Reads g and x once, 2E for E elements of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_like
from ..direct import direct_op
from ..launch import Launch
from ..library import library
from .arguments import ACTIVATIONS, NORM, check_norm, sums_dtype
from .forward import per_channel
from .kernels import COUNTS, activate_with_slope, load_norm, load_tile, locate, tile_mask
from .tiles import in_planes, norm_operands, plan_tiles

GATED_SUMS, PLAIN_SUMS = 5, 2
OF_GATES = 4  # index of the gates' gradient among the gated sums


def act_and_slope(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        y = ACTIVATIONS[act](leaf) * 1
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def norm_act_sums_reference(
    grad, x, mean, invstd, weight=None, bias=None, act: str = "identity", gated: bool = False
) -> Tensor:
    """The specification of the sums that the gradient needs."""
    grad, xc = grad.to(mean.dtype), x.to(mean.dtype) - mean[:, None, None]
    z = xc * invstd[:, None, None] * per_channel(weight, 1.0) + per_channel(bias, 0.0)
    y, slope = act_and_slope(z, act)
    terms = [grad * slope, grad * slope * xc]
    if gated:
        terms += [slope, slope * xc, grad * y]
    return torch.stack([term.sum((2, 3)) for term in terms])


@triton.jit
def store_sums(
    sums_ptr, grad_ptr, grad_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(chunks, 2 or 5, N, C): the gradient's sums over the pixels of each chunk."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    row = (tl.program_id(0) // blocks % chunks).to(tl.int64) * (N * (5 if GATED else 2))
    size = N.to(tl.int64) * C
    for n in range(n_first, n_end):
        sum_g = tl.zeros([CHANNELS, PIXELS], tl.float32)
        sum_gx = tl.zeros([CHANNELS, PIXELS], tl.float32)
        if GATED:
            sum_s = tl.zeros([CHANNELS, PIXELS], tl.float32)
            sum_sx = tl.zeros([CHANNELS, PIXELS], tl.float32)
            sum_gy = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            xc = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST) - mean
            grad = load_tile(grad_ptr, grad_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            y, slope = activate_with_slope(tl.fma(xc, scale, bias), ACT)
            sloped = grad * slope
            sum_g += sloped
            sum_gx = tl.fma(sloped, xc, sum_gx)
            if GATED:
                slope = tl.where(mask, slope, 0.0)
                sum_s += slope
                sum_sx = tl.fma(slope, xc, sum_sx)
                sum_gy = tl.fma(grad, y, sum_gy)
        ptr = sums_ptr + (row + n) * C + c
        tl.store(ptr, tl.sum(sum_g, 1, keep_dims=True), mask=c < C)
        tl.store(ptr + size, tl.sum(sum_gx, 1, keep_dims=True), mask=c < C)
        if GATED:
            tl.store(ptr + 2 * size, tl.sum(sum_s, 1, keep_dims=True), mask=c < C)
            tl.store(ptr + 3 * size, tl.sum(sum_sx, 1, keep_dims=True), mask=c < C)
            tl.store(ptr + 4 * size, tl.sum(sum_gy, 1, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_sums_kernel(
    sums_ptr, grad_ptr, grad_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    store_sums(
        sums_ptr, grad_ptr, grad_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr,
        bias_ptr, N, C, pixels, blocks, chunks, images, chunk, ACT, GATED,
        UNIT, CHANNELS, PIXELS, CHANNELS_LAST,
    )  # fmt: skip


def plan_norm_act_sums(
    grad, x, mean, invstd, weight, bias, act, gated, kernel=_norm_act_sums_kernel, **constants
) -> tuple[Launch, dict, Tensor]:
    """The launch that writes the chunks' sums, its operands, the sums (chunks, 2 or 5, N, C)."""
    maps, vectors = {"grad": grad, "x": x}, 1 if gated else 2
    launch = plan_tiles(kernel, maps, "plane", vectors, ACT=act, GATED=gated, **constants)
    shape = (launch.args["chunks"], GATED_SUMS if gated else PLAIN_SUMS, *x.shape[:2])
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    norm = norm_operands(mean, invstd, weight, bias)
    return launch, {"sums_ptr": sums, "grad_ptr": grad, "x_ptr": x, **norm}, sums


def norm_act_sums_cuda(grad, x, *arguments) -> Tensor:
    x, grad = in_planes(x, grad)
    launch, operands, sums = plan_norm_act_sums(grad, x, *arguments)
    launch.run(x.device, operands)
    return sums[0] if len(sums) == 1 else sums.sum(0)


# The CPU's kernel is registered in csrc/norm_act/gradient.cpp.
# (2, N, C), with `gated` (5, N, C).
library.define(f"norm_act_sums(Tensor grad, {NORM}, str act, bool gated) -> Tensor")
library.impl("norm_act_sums", norm_act_sums_cuda, "CUDA")
norm_act_sums = direct_op("norm_act_sums", norm_act_sums_cuda)


@torch.library.register_fake("revbifpn::norm_act_sums", lib=library)
def _norm_act_sums_fake(grad, x, *norm_and_options):
    *norm_and_act, gated = norm_and_options
    check_norm("norm_act_sums", x, *norm_and_act)
    check_like("norm_act_sums", "grad", grad, "x", x)
    return x.new_empty((GATED_SUMS if gated else PLAIN_SUMS, *x.shape[:2]), dtype=sums_dtype(x))
