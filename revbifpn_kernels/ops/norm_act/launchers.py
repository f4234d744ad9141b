"""The Triton launches of the norm_act family: how maps are cut among programs, and what runs.

norm_act 1 launch, batch_statistics 2, norm_act_grad 2 after its sums. norm_act_means and
norm_act_sums 1, and one more to add up chunks where there are too few planes to fill a GPU.

norm_act_grad folds the N sums of its channels in a launch of its own. Every streaming program would
have to read 2 to 6 numbers for each of its channels and each of N images, beside 2 numbers a pixel
for some of the images: at 64 images of 7×7, more than its own maps.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import Launch
from ..layout import Geometry
from ..tiling import BLOCK, VECTOR_BYTES
from .kernels import (
    _batch_statistics_combine_kernel,
    _batch_statistics_kernel,
    _norm_act_grad_kernel,
    _norm_act_kernel,
    _norm_act_means_kernel,
    _norm_act_sums_kernel,
    _norm_act_totals_kernel,
)

# Programs that fill an H200's 132 multiprocessors; with fewer, planes are cut into chunks. All
# numbers here by count: not yet tuned on a GPU.
PROGRAMS = 132 * 8
# Tiles of a plane that are walked faster than a launch adds up chunks.
SHORT_PLANE = 4
# Tiles of a streaming program, which loads its channels' factors once.
MAX_TILES = 32
# Elements side by side in memory that a tile holds at least, where the map has them.
SHORTEST_RUN = 16
# How much more than the fewest lanes a tile with longer runs may take.
IDLE_ALLOWED = 1.08
CHANNELS_OF_TOTALS = 8


@dataclass(frozen=True)
class Cut:
    """(N, C, H, W) cut into programs of CHANNELS channels, `images` images, `chunk` tiles."""

    shape: tuple[int, int, int]
    channels: int
    pixels: int
    images: int
    chunk: int
    unit: int
    channels_last: bool

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.shape[1], self.channels)

    @property
    def chunks(self) -> int:
        return triton.cdiv(triton.cdiv(self.shape[2], self.pixels), self.chunk)

    @property
    def parts(self) -> int:
        """Programs that share a channel."""
        return triton.cdiv(self.shape[0], self.images) * self.chunks

    def args(self) -> dict:
        N, C, pixels = self.shape
        along, across = (C, pixels) if self.channels_last else (pixels, C)
        along //= self.unit
        C, pixels = (along, across) if self.channels_last else (across, along)
        return {
            "N": N,
            "C": C,
            "pixels": pixels,
            "blocks": self.blocks,
            "chunks": self.chunks,
            "images": self.images,
            "chunk": self.chunk,
        }

    def constants(self) -> dict:
        return {
            "UNIT": self.unit,
            "CHANNELS": self.channels,
            "PIXELS": self.pixels,
            "CHANNELS_LAST": self.channels_last,
        }


def _plane_strides(maps: Geometry) -> tuple[int, int, int]:
    """Strides of n, c and of the pixels of dense planes."""
    n, c, h, w = maps.strides
    _, _, H, W = maps.shape
    return n, c, w if W > 1 else h if H > 1 else 1


def has_dense_planes(maps: Geometry, channels_last: bool) -> bool:
    """Whether pixels are evenly spaced: side by side, or their channels are."""
    _, C, H, W = maps.shape
    _, c, pixel = _plane_strides(maps)
    along = c == 1 or C == 1 if channels_last else pixel == 1
    return along and (H == 1 or W == 1 or maps.strides[2] == W * pixel)


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


def _strides_in_units(maps: Geometry, unit: int, channels_last: bool) -> tuple[int, int, int]:
    n, c, pixel = _plane_strides(maps)
    return (n // unit, 1, pixel // unit) if channels_last else (n // unit, c // unit, 1)


def _tile_sides(channels: int, pixels: int, channels_last: bool, size: int) -> tuple[int, int]:
    """CHANNELS, PIXELS of a tile of `size`: long runs in memory, few lanes outside the map."""
    along, across = (channels, pixels) if channels_last else (pixels, channels)
    shortest = min(SHORTEST_RUN, triton.next_power_of_2(along), size)
    runs = [size >> k for k in range(size.bit_length()) if size >> k >= shortest]

    def covered(run: int) -> int:
        other = size // run
        return triton.cdiv(along, run) * triton.cdiv(across, other)

    run = next(run for run in runs if covered(run) <= IDLE_ALLOWED * min(map(covered, runs)))
    return (run, size // run) if channels_last else (size // run, run)


def _cut(maps: tuple[Geometry, ...], channels_last: bool, results: str, vectors: int) -> Cut:
    """A cut for results per "pixel", per "plane" or per "channel" of maps of equal shape.

    A thread holds `vectors` of 16 bytes of each map's tile, or what is aligned of them.
    """
    N, C, H, W = maps[0].shape
    unit = _unit(maps, channels_last)
    channels, pixels = _tile_sides(C, H * W, channels_last, BLOCK * max(vectors * unit, 4))
    blocks, tiles = N * triton.cdiv(C, channels), triton.cdiv(H * W, pixels)
    depth = max(1, blocks * tiles // PROGRAMS)
    if results != "channel":
        depth = min(depth, MAX_TILES)
    if results == "plane" and (blocks >= PROGRAMS or tiles <= SHORT_PLANE):
        depth = max(depth, tiles)
    images = max(1, min(N, depth // tiles))
    chunk = triton.cdiv(tiles, triton.cdiv(tiles, min(depth, tiles)))
    return Cut((N, C, H * W), channels, pixels, images, chunk, unit, channels_last)


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: Any,
    maps: tuple[tuple[str, Geometry], ...],
    channels_last: bool,
    results: str,
    vectors: int,
    constants: tuple[tuple[str, Any], ...],
) -> tuple[Launch, Cut]:
    """The launch of a kernel that walks through maps, and its cut."""
    geometries = tuple(geometry for _, geometry in maps)
    cut = _cut(geometries, channels_last, results, vectors)
    strides = {
        f"{name}_strides": _strides_in_units(geometry, cut.unit, channels_last)
        for name, geometry in maps
    }
    launch = Launch(
        kernel,
        (cut.blocks * cut.parts,),
        {**strides, **cut.args()},
        {**dict(constants), **cut.constants()},
        threads=BLOCK,
    )
    return launch, cut


def _plan_maps(
    kernel: Any,
    maps: dict[str, Tensor],
    channels_last: bool,
    results: str,
    vectors: int = 2,
    **constants,
) -> tuple[Launch, Cut]:
    geometries = tuple((name, Geometry.of(tensor)) for name, tensor in maps.items())
    return _plan(kernel, geometries, channels_last, results, vectors, tuple(constants.items()))


def _plan_channels(kernel: Any, channels: int, args: dict, loop: str) -> Launch:
    """A launch over channels, each of which walks along `loop`, 64 at a time."""
    grid = (triton.cdiv(channels, CHANNELS_OF_TOTALS),)
    constants = {"CHANNELS": CHANNELS_OF_TOTALS, loop: 64}
    return Launch(kernel, grid, {**args, "C": channels}, constants, threads=BLOCK)


def _in_planes(maps: Tensor, channels_last: bool) -> Tensor:
    """`maps`, copied unless its planes are dense in that format."""
    if has_dense_planes(Geometry.of(maps), channels_last):
        return maps
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(maps, memory_format=layout).copy_(maps)


def _empty_result(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """An uninitialised result in x's layout, and what a kernel can write: itself if dense."""
    result = torch.empty_like(x)
    if has_dense_planes(Geometry.of(result), channels_last):
        return result, result
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return result, torch.empty_like(x, memory_format=layout)


def _filled(result: Tensor, written: Tensor) -> Tensor:
    return result if written is result else result.copy_(written)


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _factors(*factors: Tensor | None) -> dict[str, Tensor | None]:
    names = "mean_ptr", "invstd_ptr", "weight_ptr", "bias_ptr"
    return dict(zip(names, map(_contiguous, factors), strict=True))


def plan_batch_statistics(
    mean, invstd, x, eps, running_mean, running_var, batches, momentum
) -> list[tuple[Launch, dict]]:
    """The launches that write mean and invstd, for an x whose planes are dense and not empty."""
    channels_last = Geometry.of(x).channels_last
    launch, cut = _plan_maps(_batch_statistics_kernel, {"x": x}, channels_last, "channel")
    N, C, pixels = cut.shape
    parts = torch.empty((4, cut.parts, C), dtype=torch.float32, device=x.device)
    count = N * pixels
    combine = _plan_channels(_batch_statistics_combine_kernel, C, {"parts": cut.parts}, "PARTS")
    operands = {
        "mean_ptr": mean,
        "invstd_ptr": invstd,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "batches_ptr": batches,
        "parts_ptr": parts,
        "eps": float(eps),
        "momentum": float(momentum),
        "elements": float(count),
        # As PyTorch's, NaN for a single element.
        "unbiased": count / (count - 1) if count > 1 else math.inf,
    }
    return [
        (launch, {"parts_ptr": parts, "x_ptr": x, "parts": cut.parts}),
        (combine, operands),
    ]


def _batch_statistics_cuda(x, eps, running_mean, running_var, batches, momentum):
    mean, invstd = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:  # as PyTorch's: running statistics stay
        if batches is not None:
            batches.add_(1)
        return mean.fill_(math.nan), invstd.fill_(math.nan)
    x = _in_planes(x, Geometry.of(x).channels_last)
    planned = plan_batch_statistics(
        mean, invstd, x, eps, running_mean, running_var, batches, momentum
    )
    for launch, operands in planned:
        launch.run(x.device, operands)
    return mean, invstd


def plan_norm_act(y, x, mean, invstd, weight, bias, gate, act) -> tuple[Launch, dict]:
    """The launch that writes y, for maps whose planes are dense in x's format."""
    channels_last = Geometry.of(x).channels_last
    launch, _ = _plan_maps(_norm_act_kernel, {"y": y, "x": x}, channels_last, "pixel", ACT=act)
    factors = _factors(mean, invstd, weight, bias)
    return launch, {"y_ptr": y, "x_ptr": x, **factors, "gate_ptr": _contiguous(gate)}


def _norm_act_cuda(x, mean, invstd, weight, bias, gate, act) -> Tensor:
    channels_last = Geometry.of(x).channels_last
    result, y = _empty_result(x, channels_last)
    x = _in_planes(x, channels_last)
    launch, operands = plan_norm_act(y, x, mean, invstd, weight, bias, gate, act)
    launch.run(x.device, operands)
    return _filled(result, y)


def plan_norm_act_means(x, mean, invstd, weight, bias, act) -> tuple[Launch, dict, Tensor]:
    """The launch that writes the means of each chunk of pixels, and these: (chunks, N, C)."""
    channels_last = Geometry.of(x).channels_last
    launch, cut = _plan_maps(_norm_act_means_kernel, {"x": x}, channels_last, "plane", ACT=act)
    means = torch.empty((cut.chunks, *x.shape[:2]), dtype=torch.float32, device=x.device)
    factors = _factors(mean, invstd, weight, bias)
    share = 1.0 / cut.shape[2]
    return launch, {"means_ptr": means, "x_ptr": x, **factors, "share": share}, means


def _norm_act_means_cuda(x, mean, invstd, weight, bias, act) -> Tensor:
    x = _in_planes(x, Geometry.of(x).channels_last)
    launch, operands, means = plan_norm_act_means(x, mean, invstd, weight, bias, act)
    launch.run(x.device, operands)
    return means[0] if len(means) == 1 else means.sum(0)


def plan_norm_act_sums(
    grad, x, mean, invstd, weight, bias, act, gated
) -> tuple[Launch, dict, Tensor]:
    """The launch that writes the sums of each chunk, and these: (chunks, 2 or 5, N, C)."""
    channels_last = Geometry.of(x).channels_last
    maps = {"grad": grad, "x": x}
    constants = {"ACT": act, "GATED": gated}
    launch, cut = _plan_maps(
        _norm_act_sums_kernel, maps, channels_last, "plane", 1 if gated else 2, **constants
    )
    shape = (cut.chunks, 5 if gated else 2, *x.shape[:2])
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    factors = _factors(mean, invstd, weight, bias)
    return launch, {"sums_ptr": sums, "grad_ptr": grad, "x_ptr": x, **factors}, sums


def _norm_act_sums_cuda(grad, x, mean, invstd, weight, bias, act, gated) -> Tensor:
    channels_last = Geometry.of(x).channels_last
    grad, x = _in_planes(grad, channels_last), _in_planes(x, channels_last)
    launch, operands, sums = plan_norm_act_sums(grad, x, mean, invstd, weight, bias, act, gated)
    launch.run(x.device, operands)
    return sums[0] if len(sums) == 1 else sums.sum(0)


def plan_norm_act_grad(
    dx, dweight, dbias, grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch
) -> list[tuple[Launch, dict]]:
    """The launches that write dweight and dbias, then dx, for dense planes in x's format."""
    channels_last = Geometry.of(x).channels_last
    maps = {"dx": dx, "grad": grad, "x": x}
    launch, cut = _plan_maps(_norm_act_grad_kernel, maps, channels_last, "pixel", ACT=act)
    N, C, pixels = cut.shape
    shared = {
        "gate_ptr": _contiguous(gate),
        "grad_means_ptr": _contiguous(grad_means),
        "share": 1.0 / pixels,
    }
    totals = {
        "dweight_ptr": dweight,
        "dbias_ptr": dbias,
        "sums_ptr": sums.contiguous(),
        "invstd_ptr": invstd.contiguous(),
    }
    operands = {
        "dx_ptr": dx,
        "grad_ptr": grad,
        "x_ptr": x,
        **_factors(mean, invstd, weight, bias),
        "dweight_ptr": dweight if is_batch else None,
        "dbias_ptr": dbias if is_batch else None,
        "inverse_count": 1.0 / max(1, N * pixels),
    }
    return [
        (_plan_channels(_norm_act_totals_kernel, C, {"N": N}, "IMAGES"), {**totals, **shared}),
        (launch, {**operands, **shared}),
    ]


def _norm_act_grad_cuda(
    grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = Geometry.of(x).channels_last
    result, dx = _empty_result(x, channels_last)
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
    grad, x = _in_planes(grad, channels_last), _in_planes(x, channels_last)
    if sums is None:
        is_gated = grad_means is not None
        sums = _norm_act_sums_cuda(grad, x, mean, invstd, weight, bias, act, is_gated)
    planned = plan_norm_act_grad(
        dx, dweight, dbias, grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act,
        is_batch,
    )  # fmt: skip
    for launch, operands in planned:
        launch.run(x.device, operands)
    if len(x) == 0:  # as PyTorch's, whatever the statistics of nothing are
        dweight.zero_()
    return _filled(result, dx), dweight, dbias


LAUNCHERS = {
    "batch_statistics": _batch_statistics_cuda,
    "norm_act": _norm_act_cuda,
    "norm_act_means": _norm_act_means_cuda,
    "norm_act_sums": _norm_act_sums_cuda,
    "norm_act_grad": _norm_act_grad_cuda,
}
