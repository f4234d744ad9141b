"""How the family's Triton kernels divide maps among programs, and the launch plans for it."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..last_program import counters
from ..launch import Launch, launch_of
from ..layout import Geometry, memory_format
from ..tiling import BLOCK, VECTOR_BYTES, hidden

# Programs that fill an H200's 132 multiprocessors; with fewer, planes are cut into chunks. All
# numbers here are counted by hand: not yet tuned on a GPU.
PROGRAMS = 132 * 8
# Planes of at most so many tiles are not cut: a second launch, to add up chunks, takes longer.
SHORT_PLANE = 4
# Most chunks of a plane, because one program adds up the sums of all of them.
MOST_CHUNKS = 64
# Tiles per streaming program, which loads the factors of its channels once.
MAX_TILES = 32
# Fewest neighbours in memory that a tile holds, if the map has as many.
SHORTEST_RUN = 16
# A tile with longer runs is preferred if it takes at most so many times the fewest lanes.
IDLE_ALLOWED = 1.08
CHANNELS_OF_TOTALS = 8
# In channels_last, most channels that a program reduces: the last program of a block of channels
# combines the parts of all others, and takes the longer the more channels it has.
MOST_REDUCED = 32
# Parts times channels that the last program loads at once.
COMBINED = 1024


def _plane_strides(maps: Geometry) -> tuple[int, int, int]:
    """Strides of n, c and of the pixels of dense planes."""
    n, c, h, w = maps.strides
    _, _, H, W = maps.shape
    return n, c, w if W > 1 else h if H > 1 else 1


def _has_dense_planes(maps: Geometry, channels_last: bool) -> bool:
    """Whether pixels are evenly spaced: side by side, or their channels are."""
    _, C, H, W = maps.shape
    _, c, pixel = _plane_strides(maps)
    along = c == 1 or C == 1 if channels_last else pixel == 1
    return along and (H == 1 or W == 1 or maps.strides[2] == W * pixel)


def in_planes(x: Tensor, *others: Tensor) -> list[Tensor]:
    """The maps, each copied unless its planes are dense in x's memory format."""
    channels_last = Geometry.of(x).channels_last
    return [
        maps
        if _has_dense_planes(Geometry.of(maps), channels_last)
        else torch.empty_like(maps, memory_format=memory_format(channels_last)).copy_(maps)
        for maps in (x, *others)
    ]


def empty_result(x: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised result in x's layout, and what a kernel can write: itself if dense."""
    result, channels_last = torch.empty_like(x), Geometry.of(x).channels_last
    if _has_dense_planes(Geometry.of(result), channels_last):
        return result, result
    return result, torch.empty_like(x, memory_format=memory_format(channels_last))


def filled(result: Tensor, written: Tensor) -> Tensor:
    """`empty_result`'s result after the kernel has written: copied over if it wrote elsewhere."""
    return result if written is result else result.copy_(written)


def _unit(maps: tuple[Geometry, ...], channels_last: bool) -> int:
    """The power of two, at most 16 bytes, that divides the extent along memory and all strides."""
    N, C, H, W = maps[0].shape
    unit = VECTOR_BYTES // maps[0].itemsize
    numbers = [C if channels_last else H * W]
    for geometry in maps:
        n, c, pixel = _plane_strides(geometry)
        numbers += [n] * (N > 1) + ([pixel] * (H * W > 1) if channels_last else [c] * (C > 1))
    while any(number % unit for number in numbers):
        unit //= 2
    return unit


def _strides_in_units(maps: Geometry, unit: int) -> tuple[int, ...]:
    return tuple(hidden(stride // unit) for stride in _plane_strides(maps))


def _tile_sides(
    channels: int, pixels: int, channels_last: bool, size: int, results: str
) -> tuple[int, int]:
    """CHANNELS, PIXELS of a tile of `size`: long runs in memory, few lanes outside the map."""
    along, across = (channels, pixels) if channels_last else (pixels, channels)
    shortest = min(SHORTEST_RUN, triton.next_power_of_2(along), size)
    longest = MOST_REDUCED if channels_last and results == "channel" else size
    runs = [size >> k for k in range(size.bit_length()) if shortest <= size >> k <= longest]

    def covered(run: int) -> int:
        other = size // run
        return triton.cdiv(along, run) * triton.cdiv(across, other)

    run = next(run for run in runs if covered(run) <= IDLE_ALLOWED * min(map(covered, runs)))
    return (run, size // run) if channels_last else (size // run, run)


def _depth(blocks: int, tiles: int, results: str) -> int:
    """Tiles per program, for `blocks` (of channels, per image) of `tiles` tiles each."""
    depth = max(1, blocks * tiles // PROGRAMS)
    if results != "channel":
        depth = min(depth, MAX_TILES)
    if results == "plane":
        is_whole = blocks >= PROGRAMS or tiles <= SHORT_PLANE
        depth = max(depth, tiles if is_whole else triton.cdiv(tiles, MOST_CHUNKS))
    return depth


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: Any,
    maps: tuple[tuple[str, Geometry], ...],
    results: str,
    vectors: int,
    constants: tuple[tuple[str, Any], ...],
) -> Launch:
    channels_last = dict(maps)["x"].channels_last
    geometries = tuple(geometry for _, geometry in maps)
    N, C, H, W = geometries[0].shape
    pixels = H * W
    unit = _unit(geometries, channels_last)
    size = BLOCK * max(vectors * unit, 4)
    tile_channels, tile_pixels = _tile_sides(C, pixels, channels_last, size, results)
    blocks, tiles = triton.cdiv(C, tile_channels), triton.cdiv(pixels, tile_pixels)
    depth = _depth(N * blocks, tiles, results)
    images = max(1, min(N, depth // tiles))
    chunk = triton.cdiv(tiles, triton.cdiv(tiles, min(depth, tiles)))
    chunks = triton.cdiv(tiles, chunk)
    args = {
        "N": N,
        "C": C // unit if channels_last else C,
        "pixels": pixels if channels_last else pixels // unit,
        "blocks": blocks,
        "chunks": chunks,
        "images": images,
        "chunk": chunk,
    }
    for name, geometry in maps:
        args[f"{name}_strides"] = _strides_in_units(geometry, unit)
    tile = {
        "UNIT": unit,
        "CHANNELS": tile_channels,
        "PIXELS": tile_pixels,
        "CHANNELS_LAST": channels_last,
    }
    parts = triton.cdiv(N, images) * chunks  # programs that share a channel
    if results == "channel":
        args["parts"], tile["PARTS"] = parts, max(1, COMBINED // tile_channels)
    grid = (blocks * parts,)
    return Launch(kernel, grid, args, {**dict(constants), **tile}, threads=BLOCK)


def plan_tiles(
    kernel: Any, maps: dict[str, Tensor], results: str, vectors: int = 2, **constants: Any
) -> Launch:
    """The launch of a kernel that walks through maps with dense planes in x's format.

    The kernel's results are one per "pixel", "plane" or "channel". A thread holds `vectors` vectors
    of each map's tile, of 16 bytes, or of fewer where maps are less aligned.
    """
    geometries = tuple((name, Geometry.of(tensor)) for name, tensor in maps.items())
    return _plan(kernel, geometries, results, vectors, tuple(constants.items()))


def plan_channels(kernel: Any, channels: int, args: dict, loop: str) -> Launch:
    """A launch over channels, each of which walks along `loop`, 64 at a time."""
    grid = (triton.cdiv(channels, CHANNELS_OF_TOTALS),)
    constants = {"CHANNELS": CHANNELS_OF_TOTALS, loop: 64}
    return launch_of(kernel, grid, {**args, "C": channels}, constants, threads=BLOCK)


def shared_channels(launch: Launch, rows: int, x: Tensor) -> dict[str, Tensor | None]:
    """Operands of programs that share channels: their parts, `rows` per channel, and counters."""
    parts, blocks = launch.args["parts"], launch.args["blocks"]
    if parts == 1:
        return {"parts_ptr": None, "counters_ptr": None}
    shape = rows, parts, x.shape[1]
    scratch = torch.empty(shape, dtype=torch.float32, device=x.device)
    return {"parts_ptr": scratch, "counters_ptr": counters(x.device, blocks)}


def image_counters(launch: Launch, device: torch.device) -> Tensor | None:
    """A counter per group of programs that share their images, or None for groups of one."""
    programs = launch.args["blocks"] * launch.args["chunks"]
    return None if programs == 1 else counters(device, launch.grid[0] // programs)


def contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def norm_operands(*factors: Tensor | None) -> dict[str, Tensor | None]:
    """Mean, invstd, weight and bias as a kernel's operands."""
    names = "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr"
    return dict(zip(names, map(contiguous, factors), strict=True))
