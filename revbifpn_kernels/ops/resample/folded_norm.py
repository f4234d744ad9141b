"""Fusions of what transforms return, where some leave their last norm to the fusion.

A `ScaledSource` stands for scale · maps + shift. In the graph, the gradient of its maps is that of
this sum: the adjoint of resampling gives it, and the transform's own gradient starts from it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Geometry, in_format
from .add import resample_add, resample_add_out
from .scaled_sources import ScaledSource, Source, keep_for_gradients, maps_of, source_gradients
from .undo import resample_undo


def fuse(x: Tensor, sources: Sequence[Source], **options) -> Tensor:
    """`resample_add` of sources some of which may be scaled; differentiable."""
    maps, factors = _apart(sources)
    if not factors:
        return resample_add(x, maps, **options)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *maps)):
        return _Fusion.apply(x, factors, options, *maps)
    return resample_add(x, maps, **factors, **options)


def fuse_out(x: Tensor, sources: Sequence[Source], out: Tensor, **options) -> None:
    """`fuse` into `out`; no autograd."""
    maps, factors = _apart(sources)
    resample_add_out(x, maps, out, **factors, **options)


def undo(
    y: Tensor, grad: Tensor, sources: Sequence[Source], **options
) -> tuple[Tensor, list[Tensor]]:
    """`resample_undo` of a fusion; the gradients are those of the scaled sources."""
    maps, factors = _apart(sources)
    return resample_undo(y, grad, maps, **factors, **options)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factors: dict, options: dict, *maps: Tensor) -> Tensor:
        ctx.alpha, ctx.mode = options.get("alpha", 1.0), options.get("mode", "bilinear")
        ctx.channels_last = Geometry.of(x).channels_last
        keep_for_gradients(ctx, maps, [], [])  # as if they were the scaled sources
        return resample_add(x, maps, **factors, **options)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = in_format(grad, ctx.channels_last)
        needed = ctx.needs_input_grad[3:], [], []
        return grad, None, None, *source_gradients(ctx, grad, needed, ctx.alpha)[0]


def _apart(sources: Sequence[Source]) -> tuple[list[Tensor], dict]:
    """The maps, and their scales and shifts if any has some."""
    maps = [maps_of(source) for source in sources]
    scaled = [source for source in sources if isinstance(source, ScaledSource)]
    if not scaled:
        return maps, {}
    ones, zeros = torch.ones_like, torch.zeros_like
    like = scaled[0].scale
    pairs = [
        (source.scale, source.shift)
        if isinstance(source, ScaledSource)
        else (ones(like), zeros(like))
        for source in sources
    ]
    scales, shifts = zip(*pairs, strict=True)
    return maps, {"scales": scales, "shifts": shifts}
