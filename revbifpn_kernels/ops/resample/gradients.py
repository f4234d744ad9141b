"""The gradients of α·Σ_k R_k(scale_k·s_k + shift_k), for the backward of every op that fuses it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adjoint import resample_adjoint
from .reference import on_planes


def save_for_gradients(ctx, sources, scales, shifts) -> None:
    """Save what `source_gradients` needs: without scales only sizes and dtypes, no tensor."""
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
    """The gradients of sources, scales and shifts from the sum's.

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
    # R of a constant map is that constant, so a shift's gradient is α times the plain sum.
    sums = grad.sum((2, 3), dtype=sums_dtype) if any(needed[2]) else None
    for k, total in enumerate(totals):
        if needed[0][k]:
            of_sources[k] = (total * on_planes(scales[k])).to(ctx.dtypes[k])
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
        sizes = [ctx.sizes[k] for k in group]
        results = resample_adjoint(grad, sizes, alpha=alpha, mode=ctx.mode, dtype=dtype)
        for k, result in zip(group, results, strict=True):
            grads[k] = result
    return grads
