"""On the host: which launches may take the fast path, and how it cuts their maps into cells."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it beside every kernel)

from .layout import Geometry

FAST_FACTORS = (1, 2, 4, 8)
# The rows of more sources do not fit a lane's registers; the element kernels take over.
MAX_FAST_SOURCES = 4
# Lanes that fill an H200's 132 multiprocessors; with fewer, cells are as small as possible. Counted
# by hand: not yet tuned on a GPU.
LANES_TO_FILL = 132 * 512
# Most cells that a lane walks down, one below the other: it computes its position once.
MAX_CHAIN = 16
VECTOR_BYTES = 16
# Lanes per program. Counted by hand, too.
BLOCK = 128
INT32_MAX = 2**31 - 1


class Cells(NamedTuple):
    """A cut of (N, C, H, W) into cells of height × width; a lane owns a column of `chain` cells."""

    factors: tuple[int, ...]
    height: int
    width: int
    rows: int
    columns: int
    chain: int
    lanes: int
    channels_last: bool


def cut_into_cells(maps: Sequence[Geometry], *resampled: Sequence[Geometry]) -> Cells | None:
    """Cells for (N, C, H, W) maps and lists of smaller ones, or None off the fast path.

    The lists (sources, their gradients) have the same sizes, entry by entry. Cells are chained as
    far as enough lanes remain.
    """
    N, C, H, W = maps[0].shape
    factors = tuple(_factor(source.shape[2:], (H, W)) for source in resampled[0])
    if len(factors) > MAX_FAST_SOURCES or any(f not in FAST_FACTORS for f in factors):
        return None
    channels_last = maps[0].channels_last
    tensors = [*maps, *itertools.chain(*resampled)]
    if not all(_has_layout(t, channels_last) and _has_short_rows(t) for t in tensors):
        return None
    sides = sorted(FAST_FACTORS, reverse=True)
    # In nchw a row of a cell is one vector: lanes then access memory without gaps between them.
    widest = sides[0] if channels_last else VECTOR_BYTES // maps[0].itemsize
    width = next(side for side in sides if side <= widest and W % side == 0)
    smallest = max(factors)
    height = next(
        side
        for side in sides
        if side == smallest or (H % side == 0 and N * C * H * W >= LANES_TO_FILL * side * width)
    )
    rows, columns = H // height, W // width
    cells = N * C * rows * columns
    chain = next(
        length
        for length in range(min(MAX_CHAIN, rows), 0, -1)
        if rows % length == 0 and (length == 1 or cells >= 2 * LANES_TO_FILL * length)
    )
    lanes = cells // chain
    # Of 32 lanes two may own no cell (kernels/lanes.py).
    if lanes * 16 // 15 + 2 * BLOCK > INT32_MAX:
        return None
    return Cells(factors, height, width, rows, columns, chain, lanes, channels_last)


def _factor(size: Sequence[int], target: Sequence[int]) -> int | None:
    """f if `target` is f times `size` in both sides, else None."""
    (h, w), (H, W) = size, target
    return H // h if H % h == 0 and W == w * (H // h) else None


def _has_layout(tensor: Geometry, channels_last: bool) -> bool:
    along = 1 if channels_last else 3
    return tensor.strides[along] == 1 or tensor.shape[along] == 1


def _has_short_rows(tensor: Geometry) -> bool:
    """Whether offsets inside a chain of cells and its halo fit 32 bits."""
    return 8 * (MAX_CHAIN + 2) * max(tensor.strides[2], tensor.strides[3]) < INT32_MAX


def hidden(stride: int) -> int:
    """4·stride + 2: Triton compiles a kernel anew where a number is 1 or a multiple of 16.

    Inside tuples, `do_not_specialize` does not prevent that. In kernels, `shown` undoes it.
    """
    return 4 * stride + 2


@triton.jit
def shown(hidden_stride):
    return hidden_stride >> 2


def strides_in_units(
    tensor: Geometry, channels_last: bool, run: int
) -> tuple[int, tuple[int, int, int, int]]:
    """(UNIT, strides): `hidden` strides of n, c and h as multiples of UNIT elements.

    UNIT is at most the `run` of neighbours that a lane moves at once, and at most 16 bytes.

    Triton sees of an argument only whether 16 divides it. Rows of 56 elements are aligned to 16
    bytes although 16 does not divide 56; the constant factor UNIT says so.
    """
    n, c, h, w = tensor.strides
    if channels_last:
        return 1, (hidden(n), hidden(1), hidden(h), w)
    unit = min(run, VECTOR_BYTES // tensor.itemsize)
    moving = [s for s, size in zip((n, c, h), tensor.shape, strict=False) if size > 1]
    while any(stride % unit for stride in moving):
        unit //= 2
    return unit, (*(hidden(stride // unit) for stride in (n, c, h)), 1)
