"""x = y − α·Σ_k R_k(s_k) and ds_k = α·R_kᵀ(g), together: the heart of RevSilo's backward.

As in resample_add, s_k may be scaled and shifted; ds_k is then the gradient of the scaled source.
One launch does both: 2E elements read, E written, each source and its gradient moved once.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_fusion, check_like, check_maps, check_no_tangents
from ..direct import DirectCalls
from ..launch import Launch, run_all
from ..layout import Geometry
from ..library import library
from ..tiling import cut_into_cells
from .add import OPTIONS, SOURCES, fusion_operands, plan_resample_add, resample_add_reference
from .adjoint import fuse_gradients, plan_resample_adjoint, resample_adjoint_reference
from .gradients import save_for_gradients, source_gradients
from .kernels.add import add_cells
from .kernels.adjoint import adjoint_cells
from .kernels.cells import load_scaling
from .kernels.lanes import locate_cells
from .plan import CELL_COUNTS, plan_cells


def resample_undo_reference(
    y, grad, sources, *, scales=None, shifts=None, alpha=1.0, mode="bilinear", lattice=None
) -> tuple[Tensor, list[Tensor]]:
    """The specification in plain PyTorch."""
    options = {"scales": scales, "shifts": shifts, "mode": mode, "lattice": lattice}
    x = resample_add_reference(y, sources, alpha=-alpha, **options)
    sizes = [tuple(source.shape[2:]) for source in sources]
    grads = resample_adjoint_reference(grad, sizes, alpha=alpha, mode=mode)
    return x, [g.to(source.dtype) for g, source in zip(grads, sources, strict=True)]


@triton.jit(do_not_specialize=CELL_COUNTS)
def _resample_undo_cells_kernel(
    x_ptr, x_strides, y_ptr, y_strides, grad_ptr, grad_strides, source_ptrs, source_strides,
    result_ptrs, result_strides, scale_ptrs, scale_strides, shift_ptrs, shift_strides,
    alpha, lattice, lanes, C, cells_h, cells_w, chain,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr,
    SOURCE_UNITS: tl.constexpr, RESULT_UNITS: tl.constexpr,
    FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_LATTICE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask, cell = locate_cells(lanes, C, cells_h, cells_w, chain, BLOCK, CHANNELS_LAST, OVERLAP)
    scaling = load_scaling(
        scale_ptrs, scale_strides, shift_ptrs, shift_strides, cell[0], cell[1],
        len(FACTORS), HAS_SCALES,
    )  # fmt: skip
    add_cells(
        x_ptr, x_strides, X_UNIT, y_ptr, y_strides, Y_UNIT,
        source_ptrs, source_strides, SOURCE_UNITS, scaling, -alpha, lattice, mask, cell, chain,
        FACTORS, MODE, CELL_H, CELL_W, HAS_LATTICE, CHANNELS_LAST,
    )  # fmt: skip
    adjoint_cells(
        grad_ptr, grad_strides, GRAD_UNIT, result_ptrs, result_strides, RESULT_UNITS, alpha,
        mask, cell, chain, FACTORS, MODE, CELL_H, CELL_W, CHANNELS_LAST, BLOCK,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(
    x: Geometry,
    y: Geometry,
    grad: Geometry,
    sources: tuple[Geometry, ...],
    results: tuple[Geometry, ...],
    mode: str,
    has_scales: bool,
    has_lattice: bool,
) -> Launch | None:
    """The fused launch, or None off the fast path."""
    cells = cut_into_cells([x, y, grad], sources, results)
    if cells is None:
        return None
    maps, resampled = {"x": x, "y": y, "grad": grad}, {"source": sources, "result": results}
    flags = {"HAS_SCALES": has_scales, "HAS_LATTICE": has_lattice}
    return plan_cells(_resample_undo_cells_kernel, cells, maps, resampled, mode, **flags)


def plan_resample_undo(
    x, results, y, grad, sources, scales, shifts, alpha, mode, lattice
) -> list[tuple[Launch, dict]]:
    """One fused launch with its operands, or off the fast path two: add, then adjoint."""
    launch = _plan(
        *(Geometry.of(tensor) for tensor in (x, y, grad)),
        tuple(Geometry.of(source) for source in sources),
        tuple(Geometry.of(result) for result in results),
        mode,
        len(scales) > 0,
        lattice is not None,
    )
    if launch is None:
        restore = plan_resample_add(x, y, sources, scales, shifts, -alpha, mode, lattice)
        return [restore, plan_resample_adjoint(grad, results, alpha, mode)]
    operands = fusion_operands(sources, scales, shifts, alpha, lattice)
    maps = {"x_ptr": x, "y_ptr": y, "grad_ptr": grad, "result_ptrs": tuple(results)}
    return [(launch, {**maps, **operands})]


def _resample_undo_cuda(y, grad, sources, *arguments) -> tuple[Tensor, list[Tensor]]:
    x = torch.empty_like(y)
    results = [torch.empty_like(source) for source in sources]
    run_all(plan_resample_undo(x, results, y, grad, sources, *arguments), y.device)
    return x, results


_calls = DirectCalls("resample_undo", _resample_undo_cuda)

library.define(f"resample_undo(Tensor y, Tensor grad, {SOURCES}, {OPTIONS}) -> (Tensor, Tensor[])")
# The CPU's kernel is registered in csrc/resample/undo.cpp.
library.impl("resample_undo", _resample_undo_cuda, "CUDA")


def _check(y, grad, sources, scales, shifts, *options) -> None:
    check_fusion("resample_undo", "y", y, sources, scales, shifts, *options)
    check_maps("resample_undo", "grad", grad)
    check_like("resample_undo", "grad", grad, "y", y)


@torch.library.register_fake("revbifpn::resample_undo", lib=library)
def _resample_undo_fake(y, grad, sources, scales, shifts, *options):
    _check(y, grad, sources, scales or None, shifts or None, *options)
    return torch.empty_like(y), [torch.empty_like(source) for source in sources]


def _setup_context(ctx, inputs, output):
    y, _, sources, scales, shifts, ctx.alpha, ctx.mode, _ = inputs
    ctx.shape, ctx.dtype = y.shape, y.dtype
    save_for_gradients(ctx, sources, scales, shifts)


def _backward(ctx, grad_x, result_grads):
    """x as `resample_add` with −α; ds_k = α·R_kᵀ(grad) is linear in grad, with adjoint α·R_k."""
    needed = ctx.needs_input_grad[2:5]
    grad_grad, grads = None, [[None] * len(entries) for entries in needed]
    if grad_x is not None:
        grads = source_gradients(ctx, grad_x, needed, alpha=-ctx.alpha)
    present = [grad for grad in result_grads if grad is not None]
    if present:
        grad_grad = fuse_gradients(present, ctx.shape, ctx.dtype, ctx.alpha, ctx.mode)
    return grad_x, grad_grad, *grads, None, None, None


torch.library.register_autograd(
    "revbifpn::resample_undo", _backward, setup_context=_setup_context, lib=library
)


def resample_undo(
    y: Tensor,  # (N, C, H, W)
    grad: Tensor,  # (N, C, H, W)
    sources: Sequence[Tensor],  # 1 to 8 of (N, C, h_k, w_k)
    *,
    scales: Sequence[Tensor] | None = None,  # one (N, C) per source
    shifts: Sequence[Tensor] | None = None,  # one (N, C) per source
    alpha: float = 1.0,
    mode: str = "bilinear",
    lattice: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return x = y − α·Σ_k R_k(s_k) and [α·R_kᵀ(grad)]: `resample_add`'s inverse and gradients.

    Equivalent to `resample_add(y, sources, alpha=-alpha)` and
    `resample_adjoint(grad, sizes, alpha=alpha)`, in one pass.

    Args:
        y: What `resample_add(x, sources, …)` returned.
        grad: The gradient of y, of y's dtype.
        sources: As given to `resample_add`; each result has its source's dtype and memory format.
        scales, shifts: As given to `resample_add`. The results are the gradients of
            scale_k·s_k + shift_k, not of s_k: they are not multiplied by scale_k.
        alpha: As given to `resample_add`.
        mode: As given to `resample_add`.
        lattice: As given to `resample_add`; then x comes back bit for bit (−0 as 0).

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    options, tensors = (alpha, mode, lattice), ((y, grad), sources, scales, shifts)
    results = _calls(options, *tensors)
    if results is not NotImplemented:
        return results
    _check(y, grad, sources, scales, shifts, alpha, mode, lattice)
    lists = list(sources), list(scales or ()), list(shifts or ())
    check_no_tangents("resample_undo", [y, grad, *itertools.chain(*lists)])
    _calls.add((y, grad, *lists, *options), options, *tensors)
    return torch.ops.revbifpn.resample_undo(y, grad, *lists, alpha, mode, lattice)
