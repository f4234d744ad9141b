"""The resampling R of a source to the size of its target, in plain PyTorch.

R keeps a source of the target's size, enlarges a smaller one (`bilinear` as
`F.interpolate(size=..., align_corners=False)`, or `nearest`) and averages a larger one over whole
blocks. It treats each plane (n, c) alone and is linear, so it has an adjoint, written Rᵀ.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_reference(source: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """R(source): (N, C, h, w) to (N, C, *size)."""
    h, w = source.shape[2:]
    if (h, w) == tuple(size):
        return source
    if h > size[0] or w > size[1]:
        return F.avg_pool2d(source, (h // size[0], w // size[1]))
    if mode == "nearest":
        return F.interpolate(source, size=size, mode="nearest")
    return F.interpolate(source, size=size, mode="bilinear", align_corners=False)


def scaled_sources_reference(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    shifts: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """scale_k·s_k + shift_k, or s_k where there are no scales; as `dtype`."""
    if scales is None or shifts is None:
        return [source.to(dtype) for source in sources]
    scaled = zip(sources, map(on_planes, scales), map(on_planes, shifts), strict=True)
    return [(source * scale + shift).to(dtype) for source, scale, shift in scaled]


def on_planes(factor: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, 1)."""
    return factor[:, :, None, None]
