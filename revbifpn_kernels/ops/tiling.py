"""On the host: which launches may take the fast path, and how it cuts their maps into cells."""

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from .layout import Geometry

FAST_FACTORS = (1, 2, 4, 8)
# The rows of more sources do not fit a lane's registers; the element kernels take over.
MAX_FAST_SOURCES = 4
# Lanes for an H200's 132 multiprocessors; below, cells are as small as they go. By count: not yet
# tuned on a GPU.
LANES_TO_FILL = 132 * 512
# Cells a lane walks down, one after the other: it locates itself once.
MAX_CHAIN = 16
# Outputs that pay for locating a cell; chained, the fusion of such cells takes more registers.
LARGE_CELL = 64
VECTOR_BYTES = 16
# Lanes of a program. By count, too.
BLOCK = 128
INT32_MAX = 2**31 - 1
# Arguments that vary with the batch: compiled for any value, so a new batch is no new kernel.
CELL_COUNTS = ("lanes", "C", "cells_h", "cells_w", "chain")
ELEMENT_COUNTS = ("elements", "N", "C", "H", "W")


@dataclass(frozen=True)
class Cells:
    """A cut of (N, C, H, W) into cells of height × width; a lane owns a column of `chain` cells."""

    factors: tuple[int, ...]
    height: int
    width: int
    rows: int
    columns: int
    chain: int
    lanes: int
    channels_last: bool

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.lanes, BLOCK),)

    def args(self, channels: int) -> dict:
        return {
            "lanes": self.lanes,
            "C": channels,
            "cells_h": self.rows,
            "cells_w": self.columns,
            "chain": self.chain,
        }

    def constants(self, mode: str) -> dict:
        return {
            "FACTORS": self.factors,
            "MODE": mode,
            "CELL_H": self.height,
            "CELL_W": self.width,
            "CHANNELS_LAST": self.channels_last,
            "BLOCK": BLOCK,
        }


def cut_into_cells(
    maps: Sequence[Geometry], *small: Sequence[Geometry], chain_large_cells: bool
) -> Cells | None:
    """Cells for (N, C, H, W) maps and lists of smaller ones, or None off the fast path.

    The lists (sources, their gradients) have the same sizes, entry by entry. Small cells are
    chained, large ones if `chain_large_cells`, as far as enough lanes remain.
    """
    N, C, H, W = maps[0].shape
    factors = tuple(_factor(source.shape[2:], (H, W)) for source in small[0])
    if len(factors) > MAX_FAST_SOURCES or any(f not in FAST_FACTORS for f in factors):
        return None
    channels_last = maps[0].channels_last
    tensors = [*maps, *itertools.chain(*small)]
    if not all(_has_layout(t, channels_last) and _has_short_rows(t) for t in tensors):
        return None
    smallest = max(factors)
    sides = [side for side in reversed(FAST_FACTORS) if side >= smallest]
    width = next(side for side in sides if W % side == 0)
    height = next(
        side
        for side in sides
        if side == smallest or (H % side == 0 and N * C * H * W >= LANES_TO_FILL * side * width)
    )
    rows, columns = H // height, W // width
    cells = N * C * rows * columns
    longest = MAX_CHAIN if chain_large_cells or height * width < LARGE_CELL else 1
    chain = next(
        length
        for length in range(min(longest, rows), 0, -1)
        if rows % length == 0 and (length == 1 or cells >= 2 * LANES_TO_FILL * length)
    )
    lanes = cells // chain
    if lanes + BLOCK > INT32_MAX:
        return None
    return Cells(factors, height, width, rows, columns, chain, lanes, channels_last)


def _factor(size: Sequence[int], target: Sequence[int]) -> int | None:
    """f if `target` is f times `size` in both sides, else None."""
    (h, w), (H, W) = size, target
    return H // h if H % h == 0 and W == w * (H // h) else None


def _has_layout(tensor: Geometry, channels_last: bool) -> bool:
    if channels_last:
        return tensor.strides[1] == 1 or tensor.shape[1] == 1
    return tensor.strides[3] == 1 or tensor.shape[3] == 1


def _has_short_rows(tensor: Geometry) -> bool:
    """Whether offsets inside a chain of cells and its halo fit 32 bits."""
    return 8 * (MAX_CHAIN + 2) * max(tensor.strides[2], tensor.strides[3]) < INT32_MAX


def strides_in_units(
    tensor: Geometry, channels_last: bool
) -> tuple[int, tuple[int, int, int, int]]:
    """(UNIT, strides): strides of n, c and h as multiples of UNIT elements, at most 16 bytes.

    Rows of 56 elements are aligned to 16 bytes, which "divisible by 16", all that Triton sees in an
    argument, does not say; a constant factor does.
    """
    n, c, h, w = tensor.strides
    if channels_last:
        return 1, (n, 1, h, w)
    unit = VECTOR_BYTES // tensor.itemsize
    moving = [s for s, size in zip((n, c, h), tensor.shape, strict=False) if size > 1]
    while any(stride % unit for stride in moving):
        unit //= 2
    return unit, (n // unit, c // unit, h // unit, 1)


def all_strides_in_units(
    tensors: Sequence[Geometry], channels_last: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The UNITs and the strides of several tensors."""
    units, strides = zip(*(strides_in_units(t, channels_last) for t in tensors), strict=True)
    return units, strides


@dataclass(frozen=True)
class Elements:
    """Any sizes and strides: one element of (N, C, H, W) a lane."""

    shape: tuple[int, int, int, int]
    channels_last: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.count, BLOCK),)

    def args(self) -> dict:
        _, C, H, W = self.shape
        return {"elements": self.count, "C": C, "H": H, "W": W}

    def constants(self, sizes, mode: str, target: tuple[int, int] | None = None) -> dict:
        """For sources of `sizes`, resampled to `target` (this shape's own sides by default)."""
        target = target or self.shape[2:]
        longest = max(side for size in (target, *sizes) for side in size)
        fits_int32 = longest < 2**14 and self.count + BLOCK <= INT32_MAX
        return {
            "KINDS": tuple(_kind(size, target, mode) for size in sizes),
            "CHANNELS_LAST": self.channels_last,
            "INDEX": tl.int32 if fits_int32 else tl.int64,
            "BLOCK": BLOCK,
        }


def _kind(size: Sequence[int], target: Sequence[int], mode: str) -> str:
    if tuple(size) == tuple(target):
        return "identity"
    return "area" if size[0] > target[0] or size[1] > target[1] else mode


def nearest_scales(size: Sequence[int], target: Sequence[int]) -> tuple[float, float]:
    """size/target in float32, as PyTorch's nearest computes it."""
    quotients = (a / b for a, b in zip(size, target, strict=True))
    return struct.unpack("ff", struct.pack("ff", *quotients))
