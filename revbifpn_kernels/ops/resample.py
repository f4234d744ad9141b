"""The resampling R of one source to a target's size, and what every op on it checks.

R keeps a source of the target's size, enlarges a smaller one (`bilinear` as
`F.interpolate(size=..., align_corners=False)`, or `nearest`) and averages a larger one over whole
blocks. It acts on each plane (n, c) alone and is linear, so it has an adjoint, written Rᵀ.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("bilinear", "nearest")
MAX_SOURCES = 8
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("revbifpn", "DEF")


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


def is_channels_last(tensor: Tensor) -> bool:
    """Whether channels are neighbours in memory, as in channels_last maps and slices of them."""
    return tensor.stride(1) == 1 and tensor.stride(3) != 1


def empty_maps(like: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised (N, C, *size) on `like`'s device and in its memory format."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    shape = (*like.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def check_maps(op: str, name: str, maps: Tensor) -> None:
    """Raise unless `maps` is a floating-point (N, C, H, W) whose planes are not empty."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(maps).__name__}")
    if maps.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (N, C, H, W), got {tuple(maps.shape)}")
    if maps.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {maps.dtype}"
        )
    if maps.shape[2] == 0 or maps.shape[3] == 0:
        raise ValueError(f"{op}: {name} must have sides of at least 1, got {tuple(maps.shape)}")


def check_mode(op: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be 'bilinear' or 'nearest', got {mode!r}")


def check_number(op: str, name: str, value: float) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a Python number, got {type(value).__name__}")


def check_lattice(op: str, lattice: float | None) -> None:
    """Raise unless `lattice` is None or a positive power of two."""
    if lattice is None:
        return
    check_number(op, "lattice", lattice)
    if not (0.0 < lattice < math.inf) or math.frexp(lattice)[0] != 0.5:
        raise ValueError(f"{op}: lattice must be a positive power of two or None, got {lattice}")


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
    if isinstance(sources, Tensor) or not isinstance(sources, Sequence):
        raise TypeError(
            f"{op}: sources must be a sequence of tensors, got {type(sources).__name__}"
        )
    check_count(op, "sources", len(sources))
    for k, source in enumerate(sources):
        name = f"sources[{k}]"
        check_maps(op, name, source)
        if source.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{op}: {name} must share (N, C) = {tuple(x.shape[:2])} with {x_name}, "
                f"got {tuple(source.shape)}"
            )
        if source.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on {x_name}'s device {x.device}, got {source.device}"
            )
        check_precision(op, name, source.dtype, x_name, x.dtype)
        check_size(op, name, source.shape[2:], x.shape[2:])


def check_precision(
    op: str, name: str, dtype: torch.dtype, x_name: str, x_dtype: torch.dtype
) -> None:
    """Raise unless `dtype` is x's own, or a half precision beside a float32 x."""
    if dtype != x_dtype and not (x_dtype == torch.float32 and dtype.itemsize == 2):
        allowed = "float32, bfloat16 or float16" if x_dtype == torch.float32 else str(x_dtype)
        raise TypeError(f"{op}: {name} must be {allowed} beside a {x_dtype} {x_name}, got {dtype}")


def check_devices_have_kernels(op: str, x: Tensor) -> None:
    """Raise for a dtype that x's device has no kernel for (float64 on GPUs)."""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        raise TypeError(f"{op}: float64 is supported on CPU only, got a tensor on {x.device}")
