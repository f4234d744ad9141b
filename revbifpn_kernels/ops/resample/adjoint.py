"""ds_k = α·R_kᵀ(g): the gradients of all sources of a fusion, in one pass over g.

Reads g once and writes each result once: (1 + Σ 1/f_k²)·E elements.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_adjoint, check_no_tangents
from ..direct import DirectCalls
from ..launch import Launch
from ..layout import Geometry, empty_maps
from ..library import library
from ..tiling import cut_into_cells
from .kernels.adjoint import adjoint_cells, gather_outputs
from .kernels.lanes import locate_cells
from .kernels.taps import element_pointer, locate_elements
from .plan import CELL_COUNTS, ELEMENT_COUNTS, plan_cells, plan_elements
from .reference import resample_reference


def resample_adjoint_reference(
    grad, sizes, *, alpha=1.0, mode="bilinear", dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The specification in plain PyTorch: autograd of each resampling."""
    results = []
    for size in sizes:
        with torch.enable_grad():
            source = grad.new_zeros((*grad.shape[:2], *size), requires_grad=True)
            resampled = resample_reference(source, tuple(grad.shape[2:]), mode)
            (result,) = torch.autograd.grad(resampled, source, alpha * grad.detach())
        results.append(result.to(dtype or grad.dtype))
    return results


@triton.jit(do_not_specialize=CELL_COUNTS)
def _resample_adjoint_cells_kernel(
    grad_ptr, grad_strides, result_ptrs, result_strides, alpha,
    lanes, C, cells_h, cells_w, chain,
    GRAD_UNIT: tl.constexpr, RESULT_UNITS: tl.constexpr,
    FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask, cell = locate_cells(lanes, C, cells_h, cells_w, chain, BLOCK, CHANNELS_LAST, OVERLAP)
    adjoint_cells(
        grad_ptr, grad_strides, GRAD_UNIT, result_ptrs, result_strides, RESULT_UNITS, alpha,
        mask, cell, chain, FACTORS, MODE, CELL_H, CELL_W, CHANNELS_LAST, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=ELEMENT_COUNTS)
def _resample_adjoint_elements_kernel(
    grad_ptr, grad_strides, result_ptrs, result_strides, result_sizes, size_ratios,
    supports, alpha, N, C, H, W,
    KINDS: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for k in tl.static_range(len(KINDS)):
        if tl.program_id(1) == k:
            h, w = result_sizes[k]
            elements = tl.cast(N, tl.int64) * C * h * w
            if tl.program_id(0).to(tl.int64) * BLOCK < elements:
                mask, place = locate_elements(
                    elements.to(INDEX), C, h, w, BLOCK, CHANNELS_LAST, INDEX
                )
                n, c, r, q = place
                if KINDS[k] == "area":
                    i, j = r // (h // H), q // (w // W)
                    grad = tl.load(element_pointer(grad_ptr, grad_strides, n, c, i, j))
                    share = tl.zeros([BLOCK], tl.float32) + (h // H) * (w // W)
                    total = tl.div_rn(grad.to(tl.float32), share)
                elif KINDS[k] == "identity":
                    grad = tl.load(element_pointer(grad_ptr, grad_strides, n, c, r, q))
                    total = grad.to(tl.float32)
                else:
                    total = gather_outputs(
                        grad_ptr, grad_strides, n, c, r, q, (h, w), size_ratios[k], H, W,
                        supports[k][0], supports[k][1], tl.constexpr(KINDS[k]),
                    )  # fmt: skip
                ptr = element_pointer(result_ptrs[k], result_strides[k], n, c, r, q)
                tl.store(ptr, (total * alpha).to(ptr.dtype.element_ty), mask=mask)


def _supports(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """How many outputs in a row and a column can reach one source pixel, from `first_output` on."""
    return tuple(min(2 * triton.cdiv(b, a) + 2, b) for a, b in zip(size, target, strict=True))


@functools.lru_cache(maxsize=4096)
def _plan(grad: Geometry, results: tuple[Geometry, ...], mode: str) -> Launch:
    cells = cut_into_cells([grad], results)
    if cells is not None:
        kernel, maps = _resample_adjoint_cells_kernel, {"grad": grad}
        return plan_cells(kernel, cells, maps, {"result": results}, mode)
    supports = tuple(_supports(result.shape[2:], grad.shape[2:]) for result in results)
    return plan_elements(
        _resample_adjoint_elements_kernel,
        {"grad": grad},
        "result",
        results,
        mode,
        max(math.prod(result.shape) for result in results),
        {"supports": supports, "N": grad.shape[0]},
        passes=(len(results),),
    )


def plan_resample_adjoint(
    grad: Tensor, results: Sequence[Tensor], alpha, mode
) -> tuple[Launch, dict]:
    """The launch that computes every result, and its operands."""
    launch = _plan(Geometry.of(grad), tuple(Geometry.of(result) for result in results), mode)
    return launch, {"grad_ptr": grad, "result_ptrs": tuple(results), "alpha": float(alpha)}


def _resample_adjoint_cuda(grad, sizes, alpha, mode, dtype) -> list[Tensor]:
    results = [empty_maps(grad, size, dtype) for size in _pairs(sizes)]
    launch, operands = plan_resample_adjoint(grad, results, alpha, mode)
    launch.run(grad.device, operands)
    return results


_calls = DirectCalls("resample_adjoint", _resample_adjoint_cuda)


# Sizes are flat, h_0, w_0, h_1, w_1, …, because schemas have no lists of pairs.
library.define(
    "resample_adjoint(Tensor grad, SymInt[] sizes, float alpha, str interpolation, "
    "ScalarType dtype) -> Tensor[]"
)
# The CPU's kernel is registered in csrc/resample/adjoint.cpp.
library.impl("resample_adjoint", _resample_adjoint_cuda, "CUDA")


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@torch.library.register_fake("revbifpn::resample_adjoint", lib=library)
def _resample_adjoint_fake(grad, sizes, alpha, mode, dtype):
    pairs = _pairs(sizes)
    check_adjoint("resample_adjoint", grad, pairs, alpha, mode, dtype)
    return [empty_maps(grad, size, dtype) for size in pairs]


def _setup_context(ctx, inputs, output):
    grad, _, ctx.alpha, ctx.mode, _ = inputs
    ctx.shape, ctx.dtype = grad.shape, grad.dtype


def fuse_gradients(result_grads, shape, dtype, alpha, mode) -> Tensor:
    """α·Σ_k R_k(result_grad_k), (N, C, H, W): the backward of all α·R_kᵀ, with adjoint α·R_k."""
    zeros = empty_maps(result_grads[0], shape[2:], dtype).zero_()
    return torch.ops.revbifpn.resample_add(zeros, result_grads, [], [], alpha, mode, None)


def _backward(ctx, result_grads):
    present = [grad for grad in result_grads if grad is not None]
    grad = fuse_gradients(present, ctx.shape, ctx.dtype, ctx.alpha, ctx.mode) if present else None
    return grad, None, None, None, None


torch.library.register_autograd(
    "revbifpn::resample_adjoint", _backward, setup_context=_setup_context, lib=library
)


def resample_adjoint(
    grad: Tensor,  # (N, C, H, W)
    sizes: Sequence[tuple[int, int]],  # 1 to 8 of (h_k, w_k)
    *,
    alpha: float = 1.0,
    mode: str = "bilinear",
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return [α·R_kᵀ(grad)], each (N, C, h_k, w_k): the gradients of `resample_add`'s sources.

    R_kᵀ is the transpose of the resampling from (h_k, w_k) to (H, W): the vector–Jacobian product
    of `F.interpolate`. Sums are gathered in a fixed order: the same bits on every run.

    Args:
        grad: float64 (CPU), float32, bfloat16 or float16, any strides.
        sizes: The sides of the sources.
        alpha: Factor of every result.
        mode: "bilinear" (`align_corners=False`) or "nearest".
        dtype: Of the results: grad's own (default), or bfloat16/float16 of a float32 grad.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    options = tuple(sizes) if isinstance(sizes, list) else sizes, alpha, mode, dtype
    results = _calls(options, (grad,))
    if results is not NotImplemented:
        return results
    check_adjoint("resample_adjoint", grad, sizes, alpha, mode, dtype)
    check_no_tangents("resample_adjoint", [grad])
    dtype = grad.dtype if dtype is None else dtype
    flat = [side for size in sizes for side in size]
    _calls.add((grad, flat, alpha, mode, dtype), options, (grad,))
    return torch.ops.revbifpn.resample_adjoint(grad, flat, alpha, mode, dtype)
