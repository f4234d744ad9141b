"""Batch norm, activation and gate in one pass, and the means from which the gate is computed.

    z = (x − mean) · invstd · weight + bias,  y = act(z) · gate,  means = Σ act(z) / (H·W)

gate (N, C) is computed by squeeze-excite from the means, (N, C), or drawn by stochastic depth. For
E elements of x `norm_act` reads and writes E, `norm_act_means` reads E. Where too few planes would
leave a GPU idle, planes are cut into chunks, and a second launch adds up their means.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..direct import direct_op
from ..launch import Launch
from ..library import library
from .arguments import ACTIVATIONS, NORM, check_norm, sums_dtype
from .kernels import COUNTS, activate, load_norm, load_tile, locate, tile_mask, tile_pointers
from .tiles import contiguous, empty_result, filled, in_planes, norm_operands, plan_tiles


def per_channel(values: Tensor | None, default: float) -> Tensor | float:
    return default if values is None else values[:, None, None]


def norm_act_reference(
    x, mean, invstd, weight=None, bias=None, gate=None, act: str = "identity"
) -> Tensor:
    """The specification of y in plain PyTorch."""
    xc = x.to(mean.dtype) - mean[:, None, None]
    scaled = xc * invstd[:, None, None] * per_channel(weight, 1.0)
    y = ACTIVATIONS[act](scaled + per_channel(bias, 0.0))
    return (y if gate is None else y * gate[:, :, None, None]).to(x.dtype)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_kernel(
    y_ptr, y_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, gate_ptr,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean)·scale + bias)·gate."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    for n in range(n_first, n_end):
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            x = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            y = activate(tl.fma(x - mean, scale, bias), ACT)
            if gate_ptr is not None:
                y *= gate
            ptr = tile_pointers(y_ptr, y_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_means(
    means_ptr, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, share,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(chunks, N, C): share·Σ act(z) over the pixels of each chunk."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    row = (tl.program_id(0) // blocks % chunks).to(tl.int64) * N
    for n in range(n_first, n_end):
        sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            x = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            sums += tl.where(mask, activate(tl.fma(x - mean, scale, bias), ACT), 0.0)
        total = tl.sum(sums, 1, keep_dims=True) * share
        tl.store(means_ptr + (row + n) * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_means_kernel(
    means_ptr, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, share,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    store_means(
        means_ptr, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, share,
        N, C, pixels, blocks, chunks, images, chunk, ACT, UNIT, CHANNELS, PIXELS, CHANNELS_LAST,
    )  # fmt: skip


def plan_norm_act(y, x, mean, invstd, weight, bias, gate, act) -> tuple[Launch, dict]:
    """The launch that writes y, for maps whose planes are dense in x's format."""
    launch = plan_tiles(_norm_act_kernel, {"y": y, "x": x}, "pixel", ACT=act)
    norm = norm_operands(mean, invstd, weight, bias)
    return launch, {"y_ptr": y, "x_ptr": x, **norm, "gate_ptr": contiguous(gate)}


def _norm_act_cuda(x, *arguments) -> Tensor:
    result, y = empty_result(x)
    (x,) = in_planes(x)
    launch, operands = plan_norm_act(y, x, *arguments)
    launch.run(x.device, operands)
    return filled(result, y)


def plan_norm_act_means(
    x, mean, invstd, weight, bias, act, kernel=_norm_act_means_kernel, **constants
) -> tuple[Launch, dict, Tensor]:
    """The launch that writes the means of each chunk, its operands, the means (chunks, N, C)."""
    launch = plan_tiles(kernel, {"x": x}, "plane", ACT=act, **constants)
    shape = (launch.args["chunks"], *x.shape[:2])
    means = torch.empty(shape, dtype=torch.float32, device=x.device)
    norm = norm_operands(mean, invstd, weight, bias)
    share = 1.0 / (x.shape[2] * x.shape[3])
    return launch, {"means_ptr": means, "x_ptr": x, **norm, "share": share}, means


def norm_act_means_cuda(x, *arguments) -> Tensor:
    (x,) = in_planes(x)
    launch, operands, means = plan_norm_act_means(x, *arguments)
    launch.run(x.device, operands)
    return means[0] if len(means) == 1 else means.sum(0)


# The CPU's kernel is registered in csrc/norm_act/forward.cpp.
library.define(f"norm_act({NORM}, Tensor? gate, str act) -> Tensor")
library.define(f"norm_act_means({NORM}, str act) -> Tensor")
library.impl("norm_act", _norm_act_cuda, "CUDA")
library.impl("norm_act_means", norm_act_means_cuda, "CUDA")
norm_act = direct_op("norm_act", _norm_act_cuda)


@torch.library.register_fake("revbifpn::norm_act", lib=library)
def _norm_act_fake(x, mean, invstd, weight, bias, gate, act):
    check_norm("norm_act", x, mean, invstd, weight, bias, act, gate=gate)
    return torch.empty_like(x)


@torch.library.register_fake("revbifpn::norm_act_means", lib=library)
def _norm_act_means_fake(x, *norm_and_act):
    check_norm("norm_act_means", x, *norm_and_act)
    return x.new_empty(x.shape[:2], dtype=sums_dtype(x))
