"""Checks of arguments. Every message names op, argument, what was expected and what was given."""

import math
import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

MODES = ("bilinear", "nearest")
MAX_SOURCES = 8
SOURCE_NAMES = tuple(f"sources[{k}]" for k in range(MAX_SOURCES))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_maps(op: str, name: str, maps: Tensor) -> None:
    """Raise unless `maps` is a floating-point (N, C, H, W) whose planes are not empty."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(maps).__name__}")
    shape = maps.shape
    if len(shape) != 4:
        raise ValueError(f"{op}: {name} must have shape (N, C, H, W), got {tuple(shape)}")
    if maps.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {maps.dtype}"
        )
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{op}: {name} must have sides of at least 1, got {tuple(shape)}")


def check_values(op: str, name: str, values: Tensor, expected: tuple) -> None:
    """Raise unless `values` has the expected shape, dtype and device."""
    got = tuple(values.shape), values.dtype, values.device
    if got != expected:
        raise ValueError(f"{op}: {name} must have {expected}, got {got}")


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless `tensor` has the shape, dtype and device of `like`."""
    expected, got = ((tuple(t.shape), t.dtype, t.device) for t in (like, tensor))
    if got != expected:
        raise ValueError(
            f"{op}: {name} must have {like_name}'s shape, dtype and device, expected {expected}, "
            f"got {got}"
        )


def check_mode(op: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be 'bilinear' or 'nearest', got {mode!r}")


def check_number(op: str, name: str, value: float) -> None:
    """Raise unless `value` is a real number that fits a float; symbolic ones of a tracer pass."""
    if isinstance(value, (float, torch.SymFloat, torch.SymInt)):
        return
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a Python number, got {type(value).__name__}")
    if abs(value) > sys.float_info.max:
        raise ValueError(f"{op}: {name} must fit a float, got {value}")


def check_lattice(op: str, lattice: float | None, dtype: torch.dtype) -> None:
    """Raise unless `lattice` is None or a power of two to which the sums of `dtype` can round."""
    if lattice is None:
        return
    if isinstance(lattice, bool):
        raise TypeError(f"{op}: lattice must be a power of two or None, got {lattice}")
    check_number(op, "lattice", lattice)
    if not (0.0 < lattice < math.inf) or math.frexp(lattice)[0] != 0.5:
        raise ValueError(f"{op}: lattice must be a positive power of two or None, got {lattice}")
    # The lattice's inverse and 2²³ (2⁵²) times the lattice must be normal numbers.
    smallest, largest = (2.0**-1022, 2.0**971) if dtype == torch.float64 else (2.0**-126, 2.0**104)
    if not smallest <= lattice <= largest:
        raise ValueError(
            f"{op}: lattice must lie in {smallest} … {largest} for sums in "
            f"{'float64' if dtype == torch.float64 else 'float32'}, got {lattice}"
        )


def check_sizes(op: str, sizes: Sequence[Sequence[int]]) -> None:
    """Raise unless `sizes` are 1 to 8 pairs of whole numbers."""
    if not isinstance(sizes, Sequence):
        raise TypeError(f"{op}: sizes must be a sequence of (h, w), got {type(sizes).__name__}")
    check_count(op, "sizes", len(sizes))
    for k, size in enumerate(sizes):
        is_pair = isinstance(size, Sequence) and len(size) == 2
        if not is_pair or not all(isinstance(side, (int, torch.SymInt)) for side in size):
            got = f"a tensor of {tuple(size.shape)}" if isinstance(size, Tensor) else repr(size)
            raise ValueError(f"{op}: sizes[{k}] must be (h, w), such as s.shape[2:], got {got}")


def check_size(op: str, name: str, size: Sequence[int], target: Sequence[int]) -> None:
    """Raise unless R maps sides `size` to sides `target`: no larger, or larger by whole factors."""
    (h, w), (H, W) = size, target
    if h < 1 or w < 1:
        raise ValueError(f"{op}: {name} must have sides of at least 1, got {(h, w)}")
    if (h > H or w > W) and (h % H != 0 or w % W != 0):
        raise ValueError(
            f"{op}: {name} must be no larger than {(H, W)} or larger by whole factors "
            f"in both sides, got {(h, w)}"
        )


def check_count(op: str, name: str, count: int) -> None:
    if not 1 <= count <= MAX_SOURCES:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_SOURCES} entries, got {count}")


def check_sources(op: str, x_name: str, x: Tensor, sources: Sequence[Tensor]) -> None:
    """Raise unless every source can be resampled and added to x."""
    check_maps(op, x_name, x)
    _check_list(op, "sources", sources)
    check_count(op, "sources", len(sources))
    N, C, H, W = x.shape
    dtype, device, target = x.dtype, x.device, (H, W)
    for name, source in zip(SOURCE_NAMES, sources, strict=False):
        check_maps(op, name, source)
        n, c, h, w = source.shape
        if n != N or c != C:
            raise ValueError(
                f"{op}: {name} must share (N, C) = {(N, C)} with {x_name}, got {(n, c, h, w)}"
            )
        if source.device != device:
            message = f"{op}: {name} must be on {x_name}'s device {device}, got {source.device}"
            raise ValueError(message)
        if source.dtype != dtype:
            check_precision(op, name, source.dtype, x_name, dtype)
        check_size(op, name, (h, w), target)


def check_scales(op: str, x_name: str, x: Tensor, sources, scales, shifts) -> None:
    """Raise unless there are no scales and shifts, or one of each for every source."""
    if scales is None and shifts is None:
        return
    if scales is None or shifts is None:
        given, missing = ("shifts", "scales") if scales is None else ("scales", "shifts")
        raise ValueError(
            f"{op}: scales and shifts must be given together, got {given} without {missing}"
        )
    for name, values in (("scales", scales), ("shifts", shifts)):
        _check_list(op, name, values)
        if len(values) != len(sources):
            raise ValueError(
                f"{op}: {name} must hold one entry for each of {len(sources)} sources, "
                f"got {len(values)}"
            )
        for k, value in enumerate(values):
            _check_per_plane(op, f"{name}[{k}]", value, x_name, x)


def _check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"{op}: {name} must be a list or tuple of tensors, got {type(tensors).__name__}"
        )


def _check_per_plane(op: str, name: str, values: Tensor, x_name: str, x: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(values).__name__}")
    planes = x.shape[:2]
    if values.shape != planes:
        raise ValueError(
            f"{op}: {name} must have {x_name}'s (N, C) = {tuple(planes)} as its shape, "
            f"got {tuple(values.shape)}"
        )
    if values.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
        raise TypeError(
            f"{op}: {name} must be float32, or float64 beside a float64 {x_name}, "
            f"got {values.dtype} beside {x.dtype}"
        )
    if values.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on {x_name}'s device {x.device}, got {values.device}"
        )
    strides = values.stride()
    if not values.is_contiguous() and (strides[0] != 0 or (planes[1] > 1 and strides[1] != 1)):
        raise ValueError(
            f"{op}: {name} must be contiguous, or expanded from one row, got strides {strides}"
        )


def check_fusion(
    op: str, x_name: str, x: Tensor, sources, scales, shifts, alpha, mode, lattice
) -> None:
    """Raise unless x + α·Σ_k R_k(scale_k·s_k + shift_k) can be computed."""
    check_sources(op, x_name, x, sources)
    check_scales(op, x_name, x, sources, scales, shifts)
    check_number(op, "alpha", alpha)
    check_mode(op, mode)
    check_lattice(op, lattice, x.dtype)
    check_float64_is_on_cpu(op, x)


def check_adjoint(op: str, grad: Tensor, sizes, alpha, mode, dtype) -> None:
    """Raise unless α·R_kᵀ(grad) can be computed for all sizes."""
    check_maps(op, "grad", grad)
    check_sizes(op, sizes)
    for k, size in enumerate(sizes):
        check_size(op, f"sizes[{k}]", size, grad.shape[2:])
    check_number(op, "alpha", alpha)
    check_mode(op, mode)
    if dtype is not None:
        if dtype not in DTYPES:
            raise TypeError(f"{op}: dtype must be a floating-point torch.dtype, got {dtype}")
        check_precision(op, "dtype", dtype, "grad", grad.dtype)
    check_float64_is_on_cpu(op, grad)


def check_precision(
    op: str, name: str, dtype: torch.dtype, x_name: str, x_dtype: torch.dtype
) -> None:
    """Raise unless `dtype` is x's own, or a half precision beside a float32 x."""
    if dtype != x_dtype and not (x_dtype == torch.float32 and dtype.itemsize == 2):
        allowed = "float32, bfloat16 or float16" if x_dtype == torch.float32 else str(x_dtype)
        raise TypeError(
            f"{op}: {name} must be {allowed} beside a {x_dtype} {x_name}, got {dtype}; "
            f"cast it, or make {x_name} float32"
        )


def check_float64_is_on_cpu(op: str, x: Tensor) -> None:
    """Raise for a float64 x on a GPU, which has no kernel for it."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        raise TypeError(f"{op}: float64 is supported on CPU only, got a tensor on {x.device}")


def check_no_tangents(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise under forward-mode differentiation, whose tangents would be dropped silently."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{op}: forward-mode differentiation is not supported, got a tensor with a tangent; "
            "the op is linear, so apply it to the tangents themselves"
        )
