"""What the resampling ops are tried on: named shapes, layouts, dtypes and the two backends."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product

import pytest
import torch
from helpers import leaves_alone, on_this_machine
from torch import Tensor
from torch.utils._pytree import tree_map

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
    "channels-last-transposed": lambda values: (
        values.mT.contiguous(memory_format=torch.channels_last).mT
    ),
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
        (2, 5, 8, 12), ((4, 6), (2, 3)), "channels-last-slice", "channels-last-slice"
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
    "same-sizes": Case((2, 5, 9, 130), ((9, 130), (9, 130))),
    # The stride between rows of one row says nothing: here it is that of a pixel.
    "one-row": Case((1, 64, 1, 241), ((1, 241),), "channels-last-transposed"),
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


def _backend(device: str, add: Callable, add_: Callable, adjoint: Callable, undo: Callable):
    return Backend(
        device,
        leaves_alone(_scales_last(add)),
        leaves_alone(_scales_last(add_), outputs=1),
        leaves_alone(lambda grad, sizes, *args: adjoint(grad, _flat(sizes), *args)),
        leaves_alone(_scales_last(undo, maps=2)),
    )


# C++ through the dispatcher; Triton by its launchers.
_OPS = torch.ops.revbifpn
_CPP = _OPS.resample_add, _OPS.resample_add_, _OPS.resample_adjoint, _OPS.resample_undo
_TRITON = map(
    on_this_machine,
    (_resample_add_cuda, _resample_add_cuda_, _resample_adjoint_cuda, _resample_undo_cuda),
)
BACKENDS = {
    "cpp": _backend("cpu", *_CPP),
    "triton": _backend("cuda" if HAS_GPU else "cpu", *_TRITON),
}

MODES = ("bilinear", "nearest")
EMULATED = pytest.mark.slow if not HAS_GPU else ()
# Without a GPU each kernel is compiled in a second or more, and run as PTX: every kernel path,
# layout, dtype and mode comes up by default, not their product.
_QUICK_TRITON = (
    ("even", "fp32-mixed", "nearest"),
    ("odd", "fp32", "bilinear"),
    ("odd", "bf16", "nearest"),
    ("x2-x4-x8", "fp32", "bilinear"),
    ("channels-last", "fp32-mixed", "bilinear"),
    ("channels-last-slice", "fp32", "bilinear"),
    ("x2-x4-x8-unaligned", "fp16", "bilinear"),
    ("transposed", "fp32", "bilinear"),
    ("mixed-kinds", "fp32-fp16", "bilinear"),
    ("area-channels-last", "bf16", "bilinear"),
    ("one-pixel-source", "fp32", "nearest"),
)


def _triton_pairs():
    """(case, dtypes, mode, marks): the quick ones, then every other case once."""
    names = [name for name in DTYPES if name != "fp64"]
    for pair in _QUICK_TRITON:
        yield *pair, ()
    for k, case in enumerate(CASES):
        pair = case, "fp32-bf16" if case == "revbifpn" else names[k % len(names)], MODES[k % 2]
        if case not in [name for name, *_ in _QUICK_TRITON]:
            yield *pair, EMULATED


def _cpp_pairs():
    """(case, dtypes, mode, marks): by default three dtypes per case, which take turns."""
    for (k, case), (j, dtypes), (i, mode) in product(*map(enumerate, (CASES, DTYPES, MODES))):
        # The real shape is large, and its dtypes are the ones it has in training.
        if case == "revbifpn" and dtypes not in ("fp32", "fp32-bf16"):
            continue
        is_quick = (j - 3 * k) % len(DTYPES) < 3 and (i + j + k) % 2 == 0
        yield case, dtypes, mode, () if is_quick else pytest.mark.slow


def _grid(backend, pairs):
    for case, dtypes, mode, marks in pairs:
        name = f"{backend}-{case}-{dtypes}-{mode}"
        yield pytest.param(BACKENDS[backend], CASES[case], dtypes, mode, id=name, marks=marks)


def _over(triton_pairs):
    grid = [*_grid("cpp", _cpp_pairs()), *_grid("triton", triton_pairs)]
    return pytest.mark.parametrize(("backend", "case", "dtypes", "mode"), grid)


over_grid = _over(_triton_pairs())
# Triton's undo is put together from the parts of the other two, and is tried on fewer cases.
over_grid_of_undo = _over([(*pair, ()) for pair in _QUICK_TRITON[:8]])
_SCALED_TRITON = (*_QUICK_TRITON[:4], ("one-pixel-target", "fp32", "bilinear"))
over_grid_of_scaled = _over([(*pair, ()) for pair in _SCALED_TRITON])
over_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
over_modes = pytest.mark.parametrize("mode", MODES)

# A few cases that hold every kind of resampling, for what needs no grid.
SPREADS = ("even", "odd", "mixed-kinds", "x2-x4-x8", "eight-sources", "area")
over_cpp_spreads = pytest.mark.parametrize("case", [CASES[name] for name in SPREADS], ids=SPREADS)


def over(names, quick=(), slow=()):
    """Over C++ on the cases `names` and Triton on `quick` ones and, if asked for, `slow` ones."""
    marked = [("cpp", name, ()) for name in names]
    marked += [("triton", name, ()) for name in quick]
    marked += [("triton", name, EMULATED) for name in slow]
    cases = [
        pytest.param(BACKENDS[backend], CASES[name], id=f"{backend}-{name}", marks=marks)
        for backend, name, marks in marked
    ]
    return pytest.mark.parametrize(("backend", "case"), cases)


over_spreads = over(SPREADS, quick=("odd",), slow=("mixed-kinds", "x2-x4-x8", "eight-sources"))
# Factors 2, 4 and 8 alone: weights and sums of few bits are exact.
POWERS = ("even", "x2-x4-x8", "x2-x4-x8-unaligned", "mixed-powers", "channels-last")
over_powers = over(POWERS, quick=("x2-x4-x8", "channels-last"), slow=("mixed-powers",))

# Steps so large that |y| < 2^(bits of the significand)·lattice holds for the values of every case.
LATTICES = {"fp64": 2.0**-40, "fp32": 2.0**-12, "fp32-mixed": 2.0**-12, "bf16": 0.25, "fp16": 2**-5}
_LATTICE_TRIALS = [
    *(("cpp", case, dtypes, ()) for case in SPREADS for dtypes in LATTICES),
    ("triton", "x2-x4-x8", "fp32-mixed", ()),
    ("triton", "odd", "fp32", ()),
    *(("triton", case, "fp32-mixed", EMULATED) for case in ("even", "mixed-kinds")),
    ("triton", "area", "bf16", EMULATED),
    ("triton", "x2-x4-x8", "fp16", EMULATED),
]
over_lattices = pytest.mark.parametrize(
    ("backend", "case", "dtypes", "lattice"),
    [
        pytest.param(
            *(BACKENDS[backend], CASES[case], dtypes, LATTICES[dtypes]),
            id=f"{backend}-{case}-{dtypes}",
            marks=marks,
        )
        for backend, case, dtypes, marks in _LATTICE_TRIALS
    ],
)


def with_few_bits(maps, step=1.0):
    """Multiples of step/4 up to 2·step: with factors 2, 4, 8 all products and sums are exact."""
    return tree_map(lambda values: (values * 4).round().clamp(-8, 8) * (step / 4), maps)


def small_inputs():
    """x and one source of every kind, in float64 and small enough for finite differences."""
    shapes = [(4, 6), (2, 3), (4, 6), (8, 12), (3, 5), (1, 1)]
    return [torch.randn(1, 2, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_factors(x: Tensor, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """A scale and a shift for each plane of each source, no two of them alike."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = torch.randn(2, count, *x.shape[:2]).to(x.device, dtype)
    return list(factors[0] * 0.5 + 1.0), list(factors[1])
