"""y = x + α·Σ_k R_k(s_k): RevSilo's fusion and, with −α, its inverse, in one pass.

Reads x and each source once and writes y once: (2 + Σ 1/f_k²)·E elements, for E elements of x and
sources whose sides are 1/f_k of x's. Eager PyTorch moves 4E per source through its intermediates.
In place it allocates nothing.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_fusion, check_like, check_no_tangents
from ..direct import DirectCalls
from ..launch import Launch
from ..layout import Geometry, in_format
from ..library import library
from ..tiling import cut_into_cells, hidden
from .gradients import save_for_gradients, source_gradients
from .in_place import check_autograd_allows, check_memory
from .kernels.add import add_cells, add_resampled, add_update
from .kernels.cells import load_scaling
from .kernels.lanes import locate_cells
from .kernels.taps import element_pointer, locate_elements
from .plan import CELL_COUNTS, ELEMENT_COUNTS, plan_cells, plan_elements
from .reference import resample_reference, scaled_sources_reference


def round_to_lattice(update: Tensor, lattice: float) -> Tensor:
    """`update` rounded to a multiple of `lattice`, ties to even; gradients pass through."""
    return update + ((update / lattice).round() * lattice - update).detach()


def resample_add_reference(
    x, sources, *, scales=None, shifts=None, alpha=1.0, mode="bilinear", lattice=None
) -> Tensor:
    """The specification in plain PyTorch, one resampling and one addition per source."""
    size = tuple(x.shape[2:])
    scaled = scaled_sources_reference(sources, scales, shifts, x.dtype)
    update = alpha * sum(resample_reference(source, size, mode) for source in scaled)
    if lattice is not None:
        update = round_to_lattice(update, lattice)
    return x + update


@triton.jit(do_not_specialize=CELL_COUNTS)
def _resample_add_cells_kernel(
    y_ptr, y_strides, x_ptr, x_strides, source_ptrs, source_strides,
    scale_ptrs, scale_strides, shift_ptrs, shift_strides, alpha, lattice,
    lanes, C, cells_h, cells_w, chain,
    Y_UNIT: tl.constexpr, X_UNIT: tl.constexpr, SOURCE_UNITS: tl.constexpr,
    FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHAINED: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_LATTICE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask, cell = locate_cells(lanes, C, cells_h, cells_w, chain, BLOCK, CHANNELS_LAST, OVERLAP)
    scaling = load_scaling(
        scale_ptrs, scale_strides, shift_ptrs, shift_strides, cell[0], cell[1],
        len(FACTORS), HAS_SCALES,
    )  # fmt: skip
    # With one cell per lane, a constant bound removes the loop and its registers.
    add_cells(
        y_ptr, y_strides, Y_UNIT, x_ptr, x_strides, X_UNIT,
        source_ptrs, source_strides, SOURCE_UNITS, scaling, alpha, lattice, mask, cell,
        chain if CHAINED else 1, FACTORS, MODE, CELL_H, CELL_W, HAS_LATTICE, CHANNELS_LAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=ELEMENT_COUNTS)
def _resample_add_elements_kernel(
    y_ptr, y_strides, x_ptr, x_strides, source_ptrs, source_strides, source_sizes, size_ratios,
    scale_ptrs, scale_strides, shift_ptrs, shift_strides, alpha, lattice, elements, C, H, W,
    HAS_SCALES: tl.constexpr, HAS_LATTICE: tl.constexpr, KINDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask, place = locate_elements(elements, C, H, W, BLOCK, CHANNELS_LAST, INDEX)
    n, c, i, j = place
    scaling = load_scaling(
        scale_ptrs, scale_strides, shift_ptrs, shift_strides, n, c, len(KINDS), HAS_SCALES
    )
    sums = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(len(KINDS)):
        sums = add_resampled(
            sums, source_ptrs[k], source_strides[k], source_sizes[k], size_ratios[k],
            scaling[k], place, H, W, tl.constexpr(KINDS[k]),
        )  # fmt: skip
    x = tl.load(element_pointer(x_ptr, x_strides, n, c, i, j))
    y = add_update(x, sums, alpha, lattice, HAS_LATTICE)
    y_ptr = element_pointer(y_ptr, y_strides, n, c, i, j)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=4096)
def _plan(
    y: Geometry,
    x: Geometry,
    sources: tuple[Geometry, ...],
    mode: str,
    has_scales: bool,
    has_lattice: bool,
) -> Launch:
    """The launch on cells if they fit, else per element.

    Cached: planning took 81 µs per call, a look-up 11 (2 busy Xeon cores, 2026-11-23).
    """
    maps, flags = {"x": x, "y": y}, {"HAS_SCALES": has_scales, "HAS_LATTICE": has_lattice}
    cells = cut_into_cells([x, y], sources)
    if cells is None:
        elements = math.prod(x.shape)
        args = {"elements": elements}
        kernel = _resample_add_elements_kernel
        return plan_elements(kernel, maps, "source", sources, mode, elements, args, **flags)
    flags["CHAINED"] = cells.chain > 1
    return plan_cells(_resample_add_cells_kernel, cells, maps, {"source": sources}, mode, **flags)


def plan_resample_add(
    y: Tensor, x: Tensor, sources, scales, shifts, alpha, mode, lattice
) -> tuple[Launch, dict]:
    """The launch that computes y, which may be x, and its operands."""
    geometries = tuple(Geometry.of(source) for source in sources)
    flags = len(scales) > 0, lattice is not None
    launch = _plan(Geometry.of(y), Geometry.of(x), geometries, mode, *flags)
    operands = fusion_operands(sources, scales, shifts, alpha, lattice)
    return launch, {"y_ptr": y, "x_ptr": x, **operands}


def fusion_operands(sources, scales, shifts, alpha, lattice) -> dict:
    """The operands that undo has in common with add."""
    return {
        "source_ptrs": tuple(sources),
        "scale_ptrs": tuple(scales),
        "scale_strides": tuple(hidden(scale.stride(0)) for scale in scales),
        "shift_ptrs": tuple(shifts),
        "shift_strides": tuple(hidden(shift.stride(0)) for shift in shifts),
        "alpha": float(alpha),
        # The lattice and its inverse.
        "lattice": (1.0, 1.0) if lattice is None else (float(lattice), 1.0 / lattice),
    }


def _resample_add_out_cuda(x, sources, scales, shifts, out, alpha, mode, lattice) -> None:
    launch, operands = plan_resample_add(out, x, sources, scales, shifts, alpha, mode, lattice)
    launch.run(x.device, operands)


def _resample_add_cuda(x, sources, scales, shifts, *options) -> Tensor:
    y = torch.empty_like(x)
    _resample_add_out_cuda(x, sources, scales, shifts, y, *options)
    return y


def _resample_add_cuda_(x, sources, scales, shifts, *options) -> None:
    _resample_add_out_cuda(x, sources, scales, shifts, x, *options)


_calls = DirectCalls("resample_add", _resample_add_cuda)

# Called `interpolation`: `mode` would clash with an argument of PyTorch's functionalisation.
SOURCES = "Tensor[] sources, Tensor[] scales, Tensor[] shifts"
OPTIONS = "float alpha, str interpolation, float? lattice"
library.define(f"resample_add(Tensor x, {SOURCES}, {OPTIONS}) -> Tensor")
library.define(f"resample_add_(Tensor(a!) x, {SOURCES}, {OPTIONS}) -> ()")
library.define(f"resample_add_out(Tensor x, {SOURCES}, Tensor(a!) out, {OPTIONS}) -> ()")
# The CPU's kernel is registered in csrc/resample/add.cpp.
library.impl("resample_add", _resample_add_cuda, "CUDA")
library.impl("resample_add_", _resample_add_cuda_, "CUDA")
library.impl("resample_add_out", _resample_add_out_cuda, "CUDA")


@torch.library.register_fake("revbifpn::resample_add", lib=library)
def _resample_add_fake(x, sources, scales, shifts, *options):
    check_fusion("resample_add", "x", x, sources, scales or None, shifts or None, *options)
    return torch.empty_like(x)


@torch.library.register_fake("revbifpn::resample_add_", lib=library)
def _resample_add_fake_(x, sources, scales, shifts, *options):
    check_fusion("resample_add_", "x", x, sources, scales or None, shifts or None, *options)


@torch.library.register_fake("revbifpn::resample_add_out", lib=library)
def _resample_add_out_fake(x, sources, scales, shifts, out, *options):
    check_fusion("resample_add_out", "x", x, sources, scales or None, shifts or None, *options)
    check_like("resample_add_out", "out", out, "x", x)


def _setup_context(ctx, inputs, output):
    x, sources, scales, shifts, ctx.alpha, ctx.mode, _ = inputs
    ctx.channels_last = Geometry.of(x).channels_last
    save_for_gradients(ctx, sources, scales, shifts)


def _backward(ctx, grad):
    grad = in_format(grad, ctx.channels_last)
    needed = ctx.needs_input_grad[1:4]
    return grad, *source_gradients(ctx, grad, needed, ctx.alpha), None, None, None


torch.library.register_autograd(
    "revbifpn::resample_add", _backward, setup_context=_setup_context, lib=library
)


def _in_three(entries: Sequence, count: int) -> list[list]:
    """`count` entries for sources, scales and shifts each; the latter two may be empty."""
    return [list(entries[start : start + count]) for start in (0, count, 2 * count)]


class _InPlace(torch.autograd.Function):
    """Marks x as written: `register_autograd` refuses ops that write to an argument."""

    @staticmethod
    def forward(ctx, x, options, count, *tensors):
        lists = _in_three(tensors, count)
        _setup_context(ctx, (x, *lists, *options), None)
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.revbifpn.resample_add_(x, *lists, *options)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = in_format(grad, ctx.channels_last)
        needed = _in_three(ctx.needs_input_grad[3:], len(ctx.sizes))
        of_sources, of_scales, of_shifts = source_gradients(ctx, grad, needed, ctx.alpha)
        return grad, None, None, *of_sources, *of_scales, *of_shifts


def _resample_add_autograd_(x, sources, scales, shifts, alpha, mode, lattice) -> None:
    tensors = *sources, *scales, *shifts
    check_autograd_allows("resample_add_", x, tensors)
    _InPlace.apply(x, (alpha, mode, lattice), len(sources), *tensors)


def _resample_add_untracked_(x, sources, scales, shifts, alpha, mode, lattice) -> None:
    # Under inference_mode there is no autograd, but an older graph may have saved x.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.revbifpn.resample_add_(x, sources, scales, shifts, alpha, mode, lattice)
    torch.autograd.graph.increment_version(x)


library.impl("resample_add_", _resample_add_autograd_, "Autograd")
library.impl("resample_add_", _resample_add_untracked_, "ADInplaceOrView")


def resample_add(
    x: Tensor,  # (N, C, H, W)
    sources: Sequence[Tensor],  # 1 to 8 of (N, C, h_k, w_k)
    *,
    scales: Sequence[Tensor] | None = None,  # one (N, C) per source
    shifts: Sequence[Tensor] | None = None,  # one (N, C) per source
    alpha: float = 1.0,
    mode: str = "bilinear",
    lattice: float | None = None,
) -> Tensor:
    """Return y = x + α·Σ_k R_k(s_k), (N, C, H, W), in x's dtype and memory format.

    The fusion of both halves of RevSilo (arXiv 2206.14098); −α gives its inverse. For sources
    no larger than x equivalent to `x + alpha * sum(F.interpolate(s, x.shape[2:], mode=mode) …)`,
    but accumulated in float32 and rounded once.

    Args:
        x: float64 (CPU), float32, bfloat16 or float16. Contiguous, channels_last and channel slices
            of either run at full speed, other strides slower.
        sources: 1 to 8 maps (N, C, h_k, w_k). Smaller ones are enlarged (`mode`), those of x's size
            added as they are, those larger by whole factors averaged. Of x's dtype, or half
            precision beside float32.
        scales, shifts: If given, scale_k[:, :, None, None] * s_k + shift_k[:, :, None, None],
            computed while s_k is read, replaces it. Contiguous, float32 (float64 for a float64 x).
        alpha: Factor of the sum.
        mode: "bilinear" (`align_corners=False`) or "nearest".
        lattice: A power of two; α·Σ R is rounded to a multiple of it. If x lies on the lattice and
            |y| < 2²⁴·lattice, a float32 x adds exactly and −α restores it bit for bit (−0 as 0).
            Neither is checked. bfloat16 and float16 have too few bits for this.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it. Nothing is written.
    """
    options, tensors = (alpha, mode, lattice), ((x,), sources, scales, shifts)
    y = _calls(options, *tensors)
    if y is not NotImplemented:
        return y
    check_fusion("resample_add", "x", x, sources, scales, shifts, alpha, mode, lattice)
    lists = list(sources), list(scales or ()), list(shifts or ())
    check_no_tangents("resample_add", [x, *itertools.chain(*lists)])
    _calls.add((x, *lists, *options), options, *tensors)
    if torch.onnx.is_in_onnx_export():  # ONNX runtimes do not know the op
        options = {"alpha": alpha, "mode": mode, "lattice": lattice}
        return resample_add_reference(x, sources, scales=scales, shifts=shifts, **options)
    return torch.ops.revbifpn.resample_add(x, *lists, alpha, mode, lattice)


def resample_add_(
    x: Tensor,  # (N, C, H, W)
    sources: Sequence[Tensor],  # 1 to 8 of (N, C, h_k, w_k)
    *,
    scales: Sequence[Tensor] | None = None,  # one (N, C) per source
    shifts: Sequence[Tensor] | None = None,  # one (N, C) per source
    alpha: float = 1.0,
    mode: str = "bilinear",
    lattice: float | None = None,
) -> Tensor:
    """Add α·Σ_k R_k(s_k) into x and return x: `resample_add` without an allocation.

    Args: As those of `resample_add`; x may share memory only with a source that is x itself.

    Raises:
        RuntimeError: Autograd cannot record the write: x is a leaf that requires grad, a view of
            such a leaf, or a view by chunk or split (use slices).
        ValueError, TypeError: An argument does not fit; the message names it. x is untouched.
    """
    check_fusion("resample_add_", "x", x, sources, scales, shifts, alpha, mode, lattice)
    lists = list(sources), list(scales or ()), list(shifts or ())
    check_no_tangents("resample_add_", [x, *itertools.chain(*lists)])
    if not torch.compiler.is_compiling():  # the compiler copies what shares memory
        check_memory("resample_add_", x, *lists)
    torch.ops.revbifpn.resample_add_(x, *lists, alpha, mode, lattice)
    return x


def resample_add_out(
    x, sources, out, *, scales=None, shifts=None, alpha=1.0, mode="bilinear", lattice=None
) -> None:
    """Write `resample_add(x, sources, …)` into `out`, for `fuse_out`; no autograd."""
    check_fusion("resample_add_out", "x", x, sources, scales, shifts, alpha, mode, lattice)
    check_like("resample_add_out", "out", out, "x", x)
    lists = list(sources), list(scales or ()), list(shifts or ())
    check_memory("resample_add_out", out, *lists)
    torch.ops.revbifpn.resample_add_out(x, *lists, out, alpha, mode, lattice)
