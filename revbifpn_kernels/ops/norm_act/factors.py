"""A batch norm as scale · u + shift, for the fusion that reads u (see `scaled_sources.py`).

    scale = invstd · weight · kept,  shift = (bias − mean · invstd · weight) · kept

mean, invstd, weight, bias (C,); kept (N,), what stochastic depth multiplies samples by; scale and
shift (N, C). So the map that leaves the norm is neither written nor read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_values
from ..launch import Launch
from ..library import library
from ..tiling import BLOCK


def norm_factors_reference(
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """The specification in plain PyTorch."""
    scale = invstd if weight is None else invstd * weight
    shift = (0.0 if bias is None else bias) - mean * scale
    kept = mean.new_ones(samples) if kept is None else kept
    return scale * kept[:, None], shift * kept[:, None]


@triton.jit
def _norm_factors_kernel(
    scale_ptr, shift_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, kept_ptr, samples, C,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    scale = tl.load(invstd_ptr + c, mask)
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + c, mask)
    shift = -tl.load(mean_ptr + c, mask) * scale
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask) + shift
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + n)
        scale, shift = scale * kept, shift * kept
    tl.store(scale_ptr + n * C + c, scale, mask)
    tl.store(shift_ptr + n * C + c, shift, mask)


def plan_norm_factors(scale, shift, mean, invstd, weight, bias, kept) -> tuple[Launch, dict]:
    """The launch that writes scale and shift, and its operands."""
    samples, channels = scale.shape
    grid = samples, triton.cdiv(channels, BLOCK)
    launch = Launch(
        _norm_factors_kernel, grid, {"samples": samples, "C": channels}, {"BLOCK": BLOCK}
    )
    values = {"mean": mean, "invstd": invstd, "weight": weight, "bias": bias, "kept": kept}
    return launch, {
        "scale_ptr": scale,
        "shift_ptr": shift,
        **{f"{name}_ptr": t if t is None else t.contiguous() for name, t in values.items()},
    }


def norm_factors_cuda(mean, invstd, weight, bias, kept, samples) -> tuple[Tensor, Tensor]:
    scale, shift = (mean.new_empty(samples, len(mean)) for _ in range(2))
    launch, operands = plan_norm_factors(scale, shift, mean, invstd, weight, bias, kept)
    launch.run(mean.device, operands)
    return scale, shift


# Key CPU: csrc/norm_act/factors.cpp.
library.define(
    "norm_factors(Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? kept, "
    "int samples) -> (Tensor, Tensor)"
)
library.impl("norm_factors", norm_factors_cuda, "CUDA")


@torch.library.register_fake("revbifpn::norm_factors", lib=library)
def _norm_factors_fake(mean, invstd, weight, bias, kept, samples):
    per_channel, per_sample = (
        (shape, mean.dtype, mean.device) for shape in (tuple(mean.shape), (samples,))
    )
    for name, values in (("invstd", invstd), ("weight", weight), ("bias", bias)):
        if values is not None:
            check_values("norm_factors", name, values, per_channel)
    if kept is not None:
        check_values("norm_factors", "kept", kept, per_sample)
    return tuple(mean.new_empty(samples, len(mean)) for _ in range(2))


def norm_factors(
    mean: Tensor,  # (C,)
    invstd: Tensor,  # (C,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    kept: Tensor | None,  # (N,)
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (N, C), of mean's dtype: float32, or float64 on CPUs. No autograd."""
    return torch.ops.revbifpn.norm_factors(mean, invstd, weight, bias, kept, samples)
