"""What the ops are tried on: named shapes, layouts, dtypes and the two backends."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import pytest
import torch
from helpers import leaves_alone
from torch import Tensor

from revbifpn_kernels.ops.resample.add import _resample_add_cuda, _resample_add_cuda_
from revbifpn_kernels.ops.resample.adjoint import _resample_adjoint_cuda
from revbifpn_kernels.ops.resample.undo import _resample_undo_cuda

HAS_GPU = torch.cuda.is_available()


def _framed(values: Tensor, frame_shape, index, memory_format=torch.contiguous_format) -> Tensor:
    """`values` as a slice of a larger tensor of NaNs: a read beside the slice shows."""
    frame = values.new_full(frame_shape, torch.nan).contiguous(memory_format=memory_format)
    frame[index] = values
    return frame[index]


def _channel_slice(values: Tensor, memory_format=torch.contiguous_format) -> Tensor:
    N, C, H, W = values.shape
    return _framed(values, (N, 2 * C + 1, H, W), (slice(None), slice(1, C + 1)), memory_format)


def _strided(values: Tensor) -> Tensor:
    N, C, H, W = values.shape
    index = (..., slice(1, None, 2), slice(2, None, 3))
    return _framed(values, (N, C, 2 * H + 1, 3 * W + 2), index)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values,
    "channels-last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "slice": _channel_slice,
    "channels-last-slice": lambda values: _channel_slice(values, torch.channels_last),
    "strided": _strided,
    "transposed": lambda values: values.mT.contiguous().mT,
    "expanded": lambda values: values[..., :1, :1].expand(values.shape),
}


# x's dtype and those of its sources, which take turns.
DTYPES = {
    "fp64": (torch.float64, (torch.float64,)),
    "fp32": (torch.float32, (torch.float32,)),
    "bf16": (torch.bfloat16, (torch.bfloat16,)),
    "fp16": (torch.float16, (torch.float16,)),
    "fp32-bf16": (torch.float32, (torch.bfloat16,)),
    "fp32-fp16": (torch.float32, (torch.float16,)),
    "fp32-mixed": (torch.float32, (torch.bfloat16, torch.float32, torch.float16)),
}


def random_maps(shape, dtype=torch.float32, layout="contiguous", device="cpu") -> Tensor:
    return LAYOUTS[layout](torch.randn(shape).to(device, dtype))


def random_like(maps: Tensor) -> Tensor:
    return random_maps(maps.shape, maps.dtype, device=maps.device)


@dataclass(frozen=True)
class Case:
    """The shape of x, the sides of its sources, and how both lie in memory."""

    shape: tuple[int, int, int, int]
    sizes: tuple[tuple[int, int], ...]
    x_layout: str = "contiguous"
    source_layout: str = "contiguous"

    def tensors(self, dtypes="fp32", device="cpu") -> tuple[Tensor, list[Tensor]]:
        """A random x and its random sources."""
        x_dtype, source_dtypes = DTYPES[dtypes]
        x = random_maps(self.shape, x_dtype, self.x_layout, device)
        sources = [
            random_maps((*self.shape[:2], *size), dtype, self.source_layout, device)
            for size, dtype in zip(self.sizes, cycle(source_dtypes), strict=False)
        ]
        return x, sources


CASES = {
    "even": Case((2, 3, 8, 12), ((4, 6),)),
    "odd": Case((2, 3, 7, 9), ((3, 4), (5, 2))),
    "one-pixel": Case((2, 3, 1, 1), ((1, 1),)),
    "one-pixel-source": Case((2, 3, 6, 5), ((1, 1), (1, 5), (6, 1))),
    "one-pixel-target": Case((2, 3, 1, 1), ((4, 6), (1, 3))),
    "wide": Case((1, 2, 3, 136), ((3, 68), (1, 17))),
    "tall": Case((1, 2, 66, 2), ((33, 1), (9, 2))),
    "strided": Case((2, 2, 6, 10), ((3, 5), (2, 3)), "strided", "strided"),
    "transposed": Case((2, 2, 6, 10), ((3, 5), (6, 10)), "transposed", "transposed"),
    "channels-last": Case((2, 19, 8, 12), ((4, 6), (2, 3)), "channels-last", "channels-last"),
    "slice": Case((2, 3, 8, 12), ((4, 6), (3, 5)), "slice", "slice"),
    "channels-last-slice": Case(
        (2, 5, 8, 12), ((4, 6), (3, 5)), "channels-last-slice", "channels-last-slice"
    ),
    "layouts-differ": Case((2, 3, 8, 12), ((4, 6), (16, 12)), "contiguous", "channels-last"),
    "expanded-source": Case((2, 3, 8, 12), ((4, 6), (8, 12)), "contiguous", "expanded"),
    "non-whole": Case((2, 2, 13, 11), ((5, 7), (12, 10))),
    "one-axis": Case((2, 2, 8, 12), ((8, 6), (4, 12), (8, 5))),
    "area": Case((2, 3, 4, 6), ((8, 12), (4, 18), (20, 6))),
    "area-channels-last": Case((2, 3, 4, 6), ((8, 12), (4, 18)), "channels-last", "channels-last"),
    "x2-x4-x8": Case((1, 2, 16, 64), ((8, 32), (4, 16), (2, 8))),
    "mixed-powers": Case((2, 3, 8, 16), ((8, 16), (4, 8), (1, 4), (16, 64), (8, 8))),
    "x2-x4-x8-unaligned": Case((1, 2, 24, 40), ((12, 20), (6, 10), (3, 5)), "slice", "slice"),
    "mixed-kinds": Case((2, 3, 8, 12), ((8, 12), (4, 6), (16, 24), (5, 7))),
    "eight-sources": Case(
        (1, 2, 8, 16), ((8, 16), (4, 8), (2, 4), (1, 2), (16, 32), (3, 5), (8, 8), (1, 16))
    ),
    "empty-batch": Case((0, 3, 8, 12), ((4, 6), (16, 24), (5, 7))),
    "revbifpn": Case((2, 48, 56, 56), ((28, 28), (14, 14), (7, 7))),
}


def _flat(sizes) -> list[int]:
    return [side for size in sizes for side in size]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops; sizes are pairs, scales and shifts may follow at the end."""

    device: str
    add: Callable
    add_: Callable
    adjoint: Callable
    undo: Callable


def _scales_last(op: Callable, maps: int = 1) -> Callable:
    """`op`, called with scales and shifts after all else or without; `maps` precede the sources."""

    def called(*args):
        before, (sources, alpha, mode, lattice, *factors) = args[:maps], args[maps:]
        return op(*before, sources, *(factors or ([], [])), alpha, mode, lattice)

    return called


# C++ through the dispatcher; Triton by its launchers, without a GPU interpreted on CPU tensors.
BACKENDS = {
    "cpp": Backend(
        "cpu",
        leaves_alone(_scales_last(lambda *args: torch.ops.revbifpn.resample_add(*args))),
        leaves_alone(
            _scales_last(lambda *args: torch.ops.revbifpn.resample_add_(*args)), outputs=1
        ),
        leaves_alone(
            lambda grad, sizes, *args: torch.ops.revbifpn.resample_adjoint(
                grad, _flat(sizes), *args
            )
        ),
        leaves_alone(_scales_last(lambda *args: torch.ops.revbifpn.resample_undo(*args), maps=2)),
    ),
    "triton": Backend(
        "cuda" if HAS_GPU else "cpu",
        leaves_alone(_scales_last(_resample_add_cuda)),
        leaves_alone(_scales_last(_resample_add_cuda_), outputs=1),
        leaves_alone(lambda grad, sizes, *args: _resample_adjoint_cuda(grad, _flat(sizes), *args)),
        leaves_alone(_scales_last(_resample_undo_cuda, maps=2)),
    ),
}

MODES = ("bilinear", "nearest")
INTERPRETED = pytest.mark.slow if not HAS_GPU else ()
# Interpreted Triton is slow: by default it is tried on a selection, in these dtypes.
_TRITON_DTYPES = ("fp32", "bf16", "fp32-mixed")
_TRITON_CASES = ("even", "odd", "channels-last", "x2-x4-x8")


def _is_quick(case, dtypes, mode, triton_cases) -> bool:
    if case in _TRITON_CASES:
        return dtypes in _TRITON_DTYPES and (mode == "bilinear" or dtypes == "fp32")
    return case in triton_cases and (dtypes, mode) == ("fp32", "bilinear")


def _grid(triton_cases):
    for backend in BACKENDS:
        for case, dtypes in _cases_and_dtypes():
            for mode in MODES:
                if backend == "triton" and dtypes == "fp64":
                    continue
                is_quick = backend == "cpp" or _is_quick(case, dtypes, mode, triton_cases)
                yield pytest.param(
                    *(BACKENDS[backend], CASES[case], dtypes, mode),
                    id=f"{backend}-{case}-{dtypes}-{mode}",
                    marks=() if is_quick else INTERPRETED,
                )


def _cases_and_dtypes():
    for case in CASES:
        for dtypes in DTYPES:
            # The real shape is large, and its dtypes are the ones it has in training.
            if case != "revbifpn" or dtypes in ("fp32", "fp32-bf16"):
                yield case, dtypes


def _device_grid():
    """The public functions are tried on every device that has kernels here."""
    for device in ("cpu", "cuda") if HAS_GPU else ("cpu",):
        for case, dtypes in _cases_and_dtypes():
            if device == "cpu" or dtypes != "fp64":
                yield pytest.param(device, CASES[case], dtypes, id=f"{device}-{case}-{dtypes}")


def _over(triton_cases):
    return pytest.mark.parametrize(("backend", "case", "dtypes", "mode"), list(_grid(triton_cases)))


# Triton's undo is put together from the parts of the other two, and is tried on fewer cases.
over_grid, over_grid_of_undo = _over([name for name in CASES if name != "revbifpn"]), _over([])
over_device_grid = pytest.mark.parametrize(("device", "case", "dtypes"), list(_device_grid()))
over_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
# For products of many cases, which take the interpreter minutes.
over_backends_in_depth = pytest.mark.parametrize(
    "backend",
    [BACKENDS["cpp"], pytest.param(BACKENDS["triton"], marks=INTERPRETED)],
    ids=BACKENDS,
)
over_modes = pytest.mark.parametrize("mode", MODES)

# A few cases that hold every kind of resampling, for what needs no grid.
SPREADS = ("even", "odd", "mixed-kinds", "x2-x4-x8", "eight-sources", "area")
over_spreads = pytest.mark.parametrize("case", [CASES[name] for name in SPREADS], ids=SPREADS)

# Steps so large that |y| < 2^(bits of the significand)·lattice holds for the values of every case.
LATTICES = {"fp64": 2.0**-40, "fp32": 2.0**-12, "fp32-mixed": 2.0**-12, "bf16": 0.25, "fp16": 2**-5}
over_lattices = pytest.mark.parametrize(
    ("backend", "dtypes", "lattice"),
    [
        pytest.param(
            backend,
            dtypes,
            lattice,
            id=f"{name}-{dtypes}",
            marks=INTERPRETED if name == "triton" and dtypes != "fp32-mixed" else (),
        )
        for name, backend in BACKENDS.items()
        for dtypes, lattice in LATTICES.items()
        if name == "cpp" or dtypes != "fp64"
    ],
)
