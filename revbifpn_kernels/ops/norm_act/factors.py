"""Batch norm and stochastic depth as scale · u + shift (see `resample/folded_norm.py`).

    scale = invstd · weight · kept,  shift = (bias − mean · invstd · weight) · kept

mean, invstd, weight, bias (C,); kept (N,), the factor of each sample in stochastic depth; scale and
shift (N, C). `resample_add` applies them when it reads u, so the normed map is never stored.
`batch_norm_factors` (statistics.py) computes the statistics and one row of factors for all samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_values
from ..direct import direct_op
from ..launch import Launch, launch_of
from ..library import library
from ..tiling import BLOCK
from .tiles import contiguous, norm_operands


def norm_factors_reference(mean, invstd, weight, bias, kept, samples: int) -> tuple[Tensor, Tensor]:
    """The specification in plain PyTorch."""
    scale = invstd if weight is None else invstd * weight
    shift = (0.0 if bias is None else bias) - mean * scale
    kept = mean.new_ones(samples) if kept is None else kept
    return scale * kept[:, None], shift * kept[:, None]


@triton.jit
def factors_of_norm(mean, invstd, weight_ptr, bias_ptr, c, mask):
    """Scale and shift of a norm."""
    scale = invstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask)
    shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask)
    return scale, shift


@triton.jit
def _norm_factors_kernel(
    scale_ptr, shift_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, kept_ptr, samples, C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    mean, invstd = tl.load(mean_ptr + c, mask), tl.load(invstd_ptr + c, mask)
    scale, shift = factors_of_norm(mean, invstd, weight_ptr, bias_ptr, c, mask)
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + n)
        scale, shift = scale * kept, shift * kept
    tl.store(scale_ptr + n * C + c, scale, mask)
    tl.store(shift_ptr + n * C + c, shift, mask)


def plan_norm_factors(scale, shift, kept, *norm) -> tuple[Launch, dict]:
    """The launch that writes scale and shift, and its operands."""
    samples, channels = scale.shape
    operands = {"scale_ptr": scale, "shift_ptr": shift, **norm_operands(*norm)}
    grid, args = (samples, triton.cdiv(channels, BLOCK)), {"samples": samples, "C": channels}
    launch = launch_of(_norm_factors_kernel, grid, args, {"BLOCK": BLOCK})
    return launch, {**operands, "kept_ptr": contiguous(kept)}


def norm_factors_cuda(mean, invstd, weight, bias, kept, samples) -> tuple[Tensor, Tensor]:
    scale, shift = (mean.new_empty(samples, len(mean)) for _ in range(2))
    launch, operands = plan_norm_factors(scale, shift, kept, mean, invstd, weight, bias)
    launch.run(mean.device, operands)
    return scale, shift


# Scale and shift in mean's dtype: float32, or float64 on CPUs (csrc/norm_act/factors.cpp).
library.define(
    "norm_factors(Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? kept, "
    "int samples) -> (Tensor, Tensor)"
)
library.impl("norm_factors", norm_factors_cuda, "CUDA")
norm_factors = direct_op("norm_factors", norm_factors_cuda)


@torch.library.register_fake("revbifpn::norm_factors", lib=library)
def _norm_factors_fake(mean, invstd, weight, bias, kept, samples):
    given = {"invstd": invstd, "weight": weight, "bias": bias, "kept": kept}
    for name, values in given.items():
        shape = (samples,) if name == "kept" else tuple(mean.shape)
        if values is not None:
            check_values("norm_factors", name, values, (shape, mean.dtype, mean.device))
    return tuple(mean.new_empty(samples, len(mean)) for _ in range(2))
