"""`resample_add` and `resample_undo` that apply a transform's last batch norm while they read it.

The transform then returns a `ScaledSource`, which stands for scale · maps + shift, so the normed
map is never written. The gradient passed back to `maps` is the gradient w.r.t. scale · maps +
shift, not w.r.t. `maps`; the transform's backward applies the norm's own gradient to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...compiler.pytorch import in_graph
from ..layout import in_format, is_channels_last
from .add import resample_add, resample_add_out
from .gradients import save_for_gradients, source_gradients
from .undo import resample_undo


class ScaledSource(NamedTuple):
    """Stands for scale · maps + shift: a transform's result before its last norm."""

    maps: Tensor  # (N, C, h, w)
    scale: Tensor  # (N, C), as shift
    shift: Tensor

    def detach(self) -> "ScaledSource":
        return self._replace(maps=self.maps.detach())


Source = Tensor | ScaledSource


def maps_of(source: Source) -> Tensor:
    return source.maps if isinstance(source, ScaledSource) else source


def fuse(x: Tensor, sources: Sequence[Source], **options) -> Tensor:
    """`resample_add` of sources some of which may be scaled; differentiable."""
    maps, scaling = _maps_and_scaling(sources)
    if not scaling:
        return resample_add(x, maps, **options)
    if torch.compiler.is_compiling():
        return _fuse_in_graph(x, maps, scaling, options)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *maps)):
        return _Fusion.apply(x, scaling, options, *maps)
    return resample_add(x, maps, **scaling, **options)


def fuse_out(x: Tensor, sources: Sequence[Source], out: Tensor, **options) -> None:
    """Write `fuse(x, sources, …)` into `out`; no autograd."""
    maps, scaling = _maps_and_scaling(sources)
    resample_add_out(x, maps, out, **scaling, **options)


def undo(
    y: Tensor, grad: Tensor, sources: Sequence[Source], **options
) -> tuple[Tensor, list[Tensor]]:
    """`resample_undo` of a fusion; the gradients are w.r.t. the scaled sources."""
    maps, scaling = _maps_and_scaling(sources)
    return resample_undo(y, grad, maps, **scaling, **options)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scaling: dict, options: dict, *maps: Tensor) -> Tensor:
        ctx.alpha, ctx.mode = options.get("alpha", 1.0), options.get("mode", "bilinear")
        ctx.channels_last = is_channels_last(x)
        save_for_gradients(ctx, maps, [], [])  # no scales: gradients w.r.t. the scaled sources
        return resample_add(x, maps, **scaling, **options)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = in_format(grad, ctx.channels_last)
        needed = ctx.needs_input_grad[3:], [], []
        return grad, None, None, *source_gradients(ctx, grad, needed, ctx.alpha)[0]


@in_graph
def _fuse_in_graph(x: Tensor, maps: list[Tensor], scaling: dict, options: dict) -> Tensor:
    return _Fusion.apply(x, scaling, options, *maps)


def _maps_and_scaling(sources: Sequence[Source]) -> tuple[list[Tensor], dict]:
    """The maps; if any source is scaled, also scales and shifts, 1 and 0 for the others."""
    maps = [maps_of(source) for source in sources]
    scaled = [source for source in sources if isinstance(source, ScaledSource)]
    if not scaled:
        return maps, {}
    like = scaled[0].scale
    pairs = [
        source[1:]
        if isinstance(source, ScaledSource)
        else (torch.ones_like(like), torch.zeros_like(like))
        for source in sources
    ]
    scales, shifts = zip(*pairs, strict=True)
    return maps, {"scales": scales, "shifts": shifts}
