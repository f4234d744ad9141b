"""Launch plans of the resampling ops: a lane per chain of cells on the fast path, else per element.

A lane is one entry of a Triton block.
"""

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from ..launch import Launch
from ..layout import Geometry
from ..tiling import BLOCK, INT32_MAX, Cells, strides_in_units
from .kernels.lanes import GROUP

# Arguments that vary with the batch: not specialised on, so a new batch size does not recompile.
CELL_COUNTS = ("lanes", "C", "cells_h", "cells_w", "chain")
ELEMENT_COUNTS = ("elements", "N", "C", "H", "W")


def plan_cells(
    kernel: Any,
    cells: Cells,
    maps: dict[str, Geometry],
    resampled: dict[str, tuple[Geometry, ...]],
    mode: str,
    **constants: Any,
) -> Launch:
    """The launch of `kernel` on cells; the names of the maps are prefixes of its arguments."""
    units, args = {}, {}
    for name, geometry in maps.items():
        unit, strides = strides_in_units(geometry, cells.channels_last, cells.width)
        units[f"{name.upper()}_UNIT"], args[f"{name}_strides"] = unit, strides
    for name, geometries in resampled.items():
        pairs = (
            strides_in_units(geometry, cells.channels_last, max(1, cells.width // factor))
            for geometry, factor in zip(geometries, cells.factors, strict=True)
        )
        units[f"{name.upper()}_UNITS"], args[f"{name}_strides"] = zip(*pairs, strict=True)
    counts = {
        "lanes": cells.lanes,
        "C": next(iter(maps.values())).shape[1],
        "cells_h": cells.rows,
        "cells_w": cells.columns,
        "chain": cells.chain,
    }
    # Lanes that hold neighbouring cells exchange what lies on both sides of a cell's end.
    overlap = not cells.channels_last and mode == "bilinear" and max(cells.factors) > 1
    owned = GROUP.value - 2 if overlap else GROUP.value
    cut = {
        "FACTORS": cells.factors,
        "MODE": mode,
        "CELL_H": cells.height,
        "CELL_W": cells.width,
        "CHANNELS_LAST": cells.channels_last,
        "OVERLAP": overlap,
        "BLOCK": BLOCK,
    }
    grid = (triton.cdiv(cells.lanes, BLOCK // GROUP.value * owned),)
    return Launch(kernel, grid, {**args, **counts}, {**units, **constants, **cut})


def plan_elements(
    kernel: Any,
    maps: dict[str, Geometry],
    name: str,
    resampled: Sequence[Geometry],
    mode: str,
    elements: int,
    args: dict[str, Any],
    *,
    passes: tuple[int, ...] = (),
    **constants: Any,
) -> Launch:
    """The launch of `kernel` with a lane per element, for maps of any sizes and strides.

    `name` is the prefix of the arguments for the `resampled` maps. The grid is (blocks of
    `elements` lanes, *passes).
    """
    full = next(iter(maps.values()))
    _, C, H, W = full.shape
    sizes = tuple(geometry.shape[2:] for geometry in resampled)
    longest = max(H, W, *itertools.chain(*sizes))
    fits_int32 = longest < 2**14 and elements + BLOCK <= INT32_MAX
    strides = {f"{key}_strides": geometry.strides for key, geometry in maps.items()}
    strides[f"{name}_strides"] = tuple(geometry.strides for geometry in resampled)
    ratios = tuple(_size_ratios(size, (H, W)) for size in sizes)
    sides = {f"{name}_sizes": sizes, "size_ratios": ratios, "C": C, "H": H, "W": W}
    kinds = {
        "KINDS": tuple(_kind(size, (H, W), mode) for size in sizes),
        "CHANNELS_LAST": full.channels_last,
        "INDEX": tl.int32 if fits_int32 else tl.int64,
        "BLOCK": BLOCK,
    }
    grid = (triton.cdiv(elements, BLOCK), *passes)
    return Launch(kernel, grid, {**strides, **sides, **args}, {**constants, **kinds})


def _kind(size: Sequence[int], target: Sequence[int], mode: str) -> str:
    if tuple(size) == tuple(target):
        return "identity"
    return "area" if size[0] > target[0] or size[1] > target[1] else mode


def _size_ratios(size: Sequence[int], target: Sequence[int]) -> tuple[float, float]:
    """size/target in float32, as PyTorch's nearest computes it."""
    quotients = (a / b for a, b in zip(size, target, strict=True))
    return struct.unpack("ff", struct.pack("ff", *quotients))
