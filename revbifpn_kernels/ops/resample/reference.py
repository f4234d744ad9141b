"""The resampling R of one source to a target's size: its reference and what all ops on it share.

R keeps a source of the target's size, enlarges a smaller one (`bilinear` as
`F.interpolate(size=..., align_corners=False)`, or `nearest`) and averages a larger one over whole
blocks. It acts on each plane (n, c) alone and is linear, so it has an adjoint, written Rᵀ.
"""

import torch.nn.functional as F
from torch import Tensor


def resample_reference(source: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """R(source) in plain PyTorch: (N, C, h, w) to (N, C, *size)."""
    h, w = source.shape[2:]
    if (h, w) == tuple(size):
        return source
    if h > size[0] or w > size[1]:
        return F.avg_pool2d(source, (h // size[0], w // size[1]))
    if mode == "nearest":
        return F.interpolate(source, size=size, mode="nearest")
    return F.interpolate(source, size=size, mode="bilinear", align_corners=False)
