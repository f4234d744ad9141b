"""The mean and 1/√(variance + eps) of each channel of a batch.

Reads x once, in one launch on GPUs: programs reduce parts of a channel, and the last of them
combines the parts. Running statistics are updated as by torch.nn.functional.batch_norm, and one is
added to `batches`. `batch_norm_factors` also returns the norm's scale and shift (factors.py).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_maps, check_values
from ..direct import direct_op
from ..last_program import is_last
from ..launch import Launch
from ..library import library
from .arguments import sums_dtype
from .factors import factors_of_norm
from .kernels import COUNTS, load_tile, locate, pixels_in_tile, tile_mask
from .tiles import contiguous, in_planes, plan_tiles, shared_channels


def batch_statistics_reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of mean and invstd."""
    x = x.to(sums_dtype(x))
    mean = x.mean((0, 2, 3))  # more accurate than that of var_mean
    var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    return mean, (var + eps).rsqrt()


@triton.jit
def part_of_batch(
    x_ptr, x_strides, N, C, pixels, blocks, chunks, images, chunk,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Of this program's part: two terms of the mean, sum of squares about it, [CHANNELS, 1]; count.

    Values are taken about the mean of the part's first tile, the first term, so their squares
    exceed those about the part's mean at most by a factor of its tiles: nothing cancels.
    """
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mask = tile_mask(c, C, t_first, pixels, UNIT, PIXELS, CHANNELS_LAST)
    first = load_tile(x_ptr, x_strides, n_first, c, t_first, mask, UNIT, PIXELS, CHANNELS_LAST)
    in_first = pixels_in_tile(t_first, pixels, UNIT, PIXELS, CHANNELS_LAST)
    shift = tl.sum(first, 1, keep_dims=True) / in_first.to(tl.float32)
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for n in range(n_first, n_end):
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            x = load_tile(x_ptr, x_strides, n, c, t, mask, UNIT, PIXELS, CHANNELS_LAST)
            difference = tl.where(mask, x - shift, 0.0)
            sums += difference
            squares = tl.fma(difference, difference, squares)
    in_last = pixels_in_tile(t_end - 1, pixels, UNIT, PIXELS, CHANNELS_LAST)
    in_image = (t_end - 1 - t_first) * PIXELS + in_last
    count = ((n_end - n_first) * in_image).to(tl.float32)
    total = tl.sum(sums, 1, keep_dims=True)
    excess = total / count
    square = tl.fma(-total, excess, tl.sum(squares, 1, keep_dims=True))
    return shift, excess, tl.where(square < 0.0, 0.0, square), count


@triton.jit
def load_parts(parts_ptr, first, parts, c, C, shift, PARTS: tl.constexpr):
    """Means minus `shift`, sums of squares and counts of PARTS parts, [CHANNELS, PARTS] each.

    Shifts cancel without rounding, so a mean's difference is as exact as its second term.
    """
    part = first + tl.arange(0, PARTS)[None, :]
    mask = (c < C) & (part < parts)
    ptr = parts_ptr + part.to(tl.int64) * C + c
    size = parts.to(tl.int64) * C
    difference = tl.load(ptr, mask, 0.0, cache_modifier=".cg") - shift
    difference += tl.load(ptr + size, mask, 0.0, cache_modifier=".cg")
    square = tl.load(ptr + 2 * size, mask, 0.0, cache_modifier=".cg")
    return difference, square, tl.load(ptr + 3 * size, mask, 0.0, cache_modifier=".cg")


@triton.jit
def combine_parts(parts_ptr, elements, c, C, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Mean and variance of `elements` per channel from the parts, by Chan's formula."""
    shift = tl.load(parts_ptr + c, c < C, 0.0, cache_modifier=".cg")
    total = tl.zeros_like(shift) + elements
    sums = tl.zeros([CHANNELS, PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        difference, _, count = load_parts(parts_ptr, first, parts, c, C, shift, PARTS)
        sums = tl.fma(count, difference, sums)
    excess = tl.div_rn(tl.sum(sums, 1, keep_dims=True), total)
    squares = tl.zeros([CHANNELS, PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        difference, square, count = load_parts(parts_ptr, first, parts, c, C, shift, PARTS)
        difference -= excess
        squares += tl.fma(count * difference, difference, square)
    return shift + excess, tl.div_rn(tl.sum(squares, 1, keep_dims=True), total)


@triton.jit
def update_running(ptr, c, mask, value, momentum):
    running = tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)
    updated = tl.fma(value, momentum, running * (1.0 - momentum))
    tl.debug_barrier()  # a thread may store what another one has loaded
    tl.store(ptr + c, updated.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_statistics(
    mean, var, mean_ptr, invstd_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, batches_ptr, eps, momentum, unbiased, block, c, C,
):  # fmt: skip
    """Store mean and invstd; unless None scale and shift; update running statistics, `batches`."""
    invstd = tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(invstd_ptr + c, invstd, mask=c < C)
    if scale_ptr is not None:
        scale, shift = factors_of_norm(mean, invstd, weight_ptr, bias_ptr, c, c < C)
        tl.store(scale_ptr + c, scale, mask=c < C)
        tl.store(shift_ptr + c, shift, mask=c < C)
    if running_mean_ptr is not None:
        update_running(running_mean_ptr, c, c < C, mean, momentum)
    if running_var_ptr is not None:
        update_running(running_var_ptr, c, c < C, var * unbiased, momentum)
    if batches_ptr is not None:
        if block == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=COUNTS)
def _batch_statistics_kernel(
    mean_ptr, invstd_ptr, scale_ptr, shift_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    parts_ptr, counters_ptr, x_ptr, x_strides, weight_ptr, bias_ptr,
    eps, momentum, elements, unbiased,
    N, C, pixels, blocks, chunks, images, chunk, parts, PARTS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Mean and invstd, scale and shift unless None; updates running statistics and `batches`.

    A channel has `elements` of them, and `unbiased` = elements / (elements − 1). Where programs
    share channels, `parts_ptr` (4, parts, C) keeps what `part_of_batch` returns of each.
    """
    shift, excess, square, count = part_of_batch(
        x_ptr, x_strides, N, C, pixels, blocks, chunks, images, chunk,
        UNIT, CHANNELS, PIXELS, CHANNELS_LAST,
    )  # fmt: skip
    C = C * UNIT if CHANNELS_LAST else C
    block = tl.program_id(0) % blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    if counters_ptr is None:
        var = tl.div_rn(square, tl.zeros_like(square) + elements)
        finish_statistics(
            shift + excess, var, mean_ptr, invstd_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
            running_mean_ptr, running_var_ptr, batches_ptr, eps, momentum, unbiased, block, c, C,
        )  # fmt: skip
    else:
        ptr = parts_ptr + (tl.program_id(0) // blocks).to(tl.int64) * C + c
        size = parts.to(tl.int64) * C
        tl.store(ptr, shift, mask=c < C)
        tl.store(ptr + size, excess, mask=c < C)
        tl.store(ptr + 2 * size, square, mask=c < C)
        tl.store(ptr + 3 * size, tl.zeros_like(shift) + count, mask=c < C)
        if is_last(counters_ptr, block, parts):
            mean, var = combine_parts(parts_ptr, elements, c, C, parts, CHANNELS, PARTS)
            finish_statistics(
                mean, var, mean_ptr, invstd_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr,
                running_mean_ptr, running_var_ptr, batches_ptr, eps, momentum, unbiased,
                block, c, C,
            )  # fmt: skip


def plan_batch_statistics(
    results, x, eps, running_mean, running_var, batches, momentum, weight=None, bias=None
) -> tuple[Launch, dict]:
    """The launch that writes mean and invstd, or these, scale and shift: the `results`.

    x is not empty, and its planes are dense.
    """
    launch = plan_tiles(_batch_statistics_kernel, {"x": x}, "channel")
    count = x.numel() // x.shape[1]
    mean, invstd, scale, shift = results if len(results) == 4 else (*results, None, None)
    operands = {
        "mean_ptr": mean,
        "invstd_ptr": invstd,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "batches_ptr": batches,
        **shared_channels(launch, 4, x),
        "x_ptr": x,
        "weight_ptr": contiguous(weight),
        "bias_ptr": contiguous(bias),
        "eps": float(eps),
        "momentum": float(momentum),
        "elements": float(count),
        # The running variance of a single element is NaN, as PyTorch's.
        "unbiased": count / (count - 1) if count > 1 else math.inf,
    }
    return launch, operands


def _write_statistics(results, x, eps, mean, var, batches, momentum, *affine) -> None:
    if x.numel() > 0:
        (x,) = in_planes(x)
        arguments = results, x, eps, mean, var, batches, momentum, *affine
        launch, operands = plan_batch_statistics(*arguments)
        return launch.run(x.device, operands)
    for result in results:  # as in PyTorch, running statistics stay
        result.fill_(math.nan)
    if batches is not None:
        batches.add_(1)


def _new_statistics(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=sums_dtype(x)) for _ in range(2))


def _new_factors(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((1, x.shape[1]), dtype=sums_dtype(x)) for _ in range(2))


def batch_statistics_cuda(x, *arguments) -> tuple[Tensor, ...]:
    results = _new_statistics(x)
    _write_statistics(results, x, *arguments)
    return results


def batch_norm_factors_cuda(x, weight, bias, *arguments) -> tuple[Tensor, ...]:
    results = *_new_statistics(x), *_new_factors(x)
    _write_statistics(results, x, *arguments, weight, bias)
    return results


# The CPU's kernels are registered in csrc/norm_act/statistics.cpp.
STATISTICS = (
    "float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, "
    "float momentum"
)
library.define(f"batch_statistics(Tensor x, {STATISTICS}) -> (Tensor, Tensor)")
# Mean and invstd (C,); scale and shift (1, C).
library.define(
    f"batch_norm_factors(Tensor x, Tensor? weight, Tensor? bias, {STATISTICS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.impl("batch_statistics", batch_statistics_cuda, "CUDA")
library.impl("batch_norm_factors", batch_norm_factors_cuda, "CUDA")
batch_statistics = direct_op("batch_statistics", batch_statistics_cuda)
batch_norm_factors = direct_op("batch_norm_factors", batch_norm_factors_cuda)


@torch.library.register_fake("revbifpn::batch_statistics", lib=library)
def _batch_statistics_fake(x, *_):
    check_maps("batch_statistics", "x", x)
    return _new_statistics(x)


@torch.library.register_fake("revbifpn::batch_norm_factors", lib=library)
def _batch_norm_factors_fake(x, weight, bias, *_):
    check_maps("batch_norm_factors", "x", x)
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None:
            expected = (x.shape[1],), sums_dtype(x), x.device
            check_values("batch_norm_factors", name, values, expected)
    return *_new_statistics(x), *_new_factors(x)
