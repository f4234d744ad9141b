"""scale_k·s_k + shift_k in place of a source s_k: its reference, and the gradients of all three.

So a transform's last batch norm, with stochastic depth, is folded into the fusion that reads it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def scaled_sources_reference(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    shifts: Sequence[Tensor] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """scale_k·s_k + shift_k in plain PyTorch, or s_k where there are no scales; as `dtype`."""
    if scales is None or shifts is None:
        return [source.to(dtype) for source in sources]
    scaled = zip(sources, map(_on_planes, scales), map(_on_planes, shifts), strict=True)
    return [(source * scale + shift).to(dtype) for source, scale, shift in scaled]


def _on_planes(factor: Tensor) -> Tensor:
    return factor[:, :, None, None]


def in_three(entries: Sequence, count: int) -> list[list]:
    """As sources, scales and shifts, `count` of each; the latter two empty where there are none."""
    return [list(entries[start : start + count]) for start in (0, count, 2 * count)]


def keep_for_gradients(ctx, sources, scales, shifts) -> None:
    """Without scales an op is linear, so sizes and dtypes suffice and no tensor is saved."""
    ctx.sizes = [tuple(source.shape[2:]) for source in sources]
    ctx.dtypes = [source.dtype for source in sources]
    ctx.has_scales = len(scales) > 0
    if ctx.has_scales:
        pairs = list(zip(sources, scales, strict=True))
        ctx.save_for_backward(
            *(source if scale.requires_grad else None for source, scale in pairs),
            *(scale if source.requires_grad else None for source, scale in pairs),
        )


def source_gradients(
    ctx, grad: Tensor, needed: Sequence[Sequence[bool]], alpha: float
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """The gradients of α·Σ_k R_k(scale_k·s_k + shift_k): of sources, scales and shifts.

    `needed` says for each of the three lists which entries need one.
    """
    if not ctx.has_scales:
        return _resample_gradients(ctx, grad, needed[0], alpha, ctx.dtypes), [], []
    count = len(ctx.sizes)
    is_needed = [any(pair) for pair in zip(*needed[:2], strict=True)]
    totals = _resample_gradients(ctx, grad, is_needed, alpha, [grad.dtype] * count)
    of_sources, of_scales, of_shifts = [None] * count, [None] * count, [None] * count
    sources, scales = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    sums_dtype = torch.promote_types(grad.dtype, torch.float32)
    # R keeps a constant, so what a shift adds to the result is itself, whatever the sizes.
    sums = grad.sum((2, 3), dtype=sums_dtype) if any(needed[2]) else None
    for k, total in enumerate(totals):
        if needed[0][k]:
            of_sources[k] = (total * _on_planes(scales[k])).to(ctx.dtypes[k])
        if needed[1][k]:
            of_scales[k] = (total.to(sums_dtype) * sources[k]).sum((2, 3))
        if needed[2][k]:
            of_shifts[k] = sums * alpha
    return of_sources, of_scales, of_shifts


def _resample_gradients(
    ctx, grad: Tensor, needed: Sequence[bool], alpha: float, dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """α·R_kᵀ(grad) for the sources that need one; one launch for each dtype among them."""
    grads: list[Tensor | None] = [None] * len(ctx.sizes)
    wanted = [k for k, is_needed in enumerate(needed) if is_needed]
    for dtype in {dtypes[k]: None for k in wanted}:
        group = [k for k in wanted if dtypes[k] == dtype]
        sizes = [side for k in group for side in ctx.sizes[k]]
        results = torch.ops.revbifpn.resample_adjoint(grad, sizes, alpha, ctx.mode, dtype)
        for k, result in zip(group, results, strict=True):
            grads[k] = result
    return grads


class ScaledSource(NamedTuple):
    """Stands for scale · maps + shift: what a transform returns before its last norm."""

    maps: Tensor  # (N, C, h, w)
    scale: Tensor  # (N, C), as shift
    shift: Tensor

    def detach(self) -> "ScaledSource":
        return self._replace(maps=self.maps.detach())


Source = Tensor | ScaledSource


def maps_of(source: Source) -> Tensor:
    return source.maps if isinstance(source, ScaledSource) else source
