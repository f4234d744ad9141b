"""What the norm_act family is tried on: named shapes, their factors, and the two backends."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import EMULATED, HAS_GPU
from cases import LAYOUTS as COMMON_LAYOUTS
from helpers import leaves_alone, on_this_machine
from torch import Tensor

from revbifpn_kernels.ops.norm_act import tiles
from revbifpn_kernels.ops.norm_act.arguments import sums_dtype
from revbifpn_kernels.ops.norm_act.forward import _norm_act_cuda, norm_act_means_cuda
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_cuda, norm_act_input_grad_cuda
from revbifpn_kernels.ops.norm_act.statistics import (
    batch_statistics_cuda,
    batch_statistics_reference,
)
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums_cuda

EPS = 1e-3
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _cropped(values: Tensor) -> Tensor:
    """Rows side by side in memory, but with NaN between them."""
    N, C, H, W = values.shape
    frame = values.new_full((N, C, H, W + 3), torch.nan)
    frame[..., 1 : W + 1] = values
    return frame[..., 1 : W + 1]


def _apart(values: Tensor) -> Tensor:
    """One NaN between images, which no 16 bytes divide."""
    frame = values.new_full((len(values), values[0].numel() + 1), torch.nan)
    frame[:, :-1] = values.flatten(1)
    return frame[:, :-1].view(values.shape)


LAYOUTS = COMMON_LAYOUTS | {"cropped": _cropped, "apart": _apart}


@dataclass
class Inputs:
    """A map, its gradient and all that an op may be given beside them."""

    x: Tensor
    grad: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor
    grad_means: Tensor

    @property
    def norm(self) -> tuple:
        return self.x, self.mean, self.invstd, self.weight, self.bias


@dataclass(frozen=True)
class Case:
    """The shape of x, and how it and its gradient lie in memory."""

    shape: tuple[int, int, int, int]
    layout: str = "contiguous"
    grad_layout: str = ""

    def maps(self, dtype: torch.dtype, device: str, offset: float = 1.0) -> Tensor:
        values = torch.randn(self.shape, dtype=torch.float64) + offset
        return LAYOUTS[self.layout](values.to(device, dtype))

    def inputs(self, dtypes: str = "fp32", device: str = "cpu", affine: bool = True) -> Inputs:
        N, C, _, _ = self.shape
        x = self.maps(DTYPES[dtypes], device)
        grad = torch.randn(self.shape, dtype=torch.float64).to(device, x.dtype)
        if N > 0:
            mean, invstd = batch_statistics_reference(x, EPS)
        else:
            mean, invstd = (x.new_full((C,), torch.nan, dtype=sums_dtype(x)) for _ in range(2))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, mean.dtype)

        weight, bias = (random(C) + 1, random(C)) if affine else (None, None)
        grad = LAYOUTS[self.grad_layout or self.layout](grad)
        gate, grad_means = random(N, C).sigmoid(), random(N, C)
        return Inputs(x, grad, mean, invstd, weight, bias, gate, grad_means)


# Many channels: the judge compares largest errors, which chance decides where there are few.
CASES = {
    "even": Case((2, 16, 8, 12)),
    "odd": Case((2, 17, 7, 9)),
    "one-pixel": Case((4, 64, 1, 1)),
    "one-column": Case((3, 20, 11, 1), "channels-last"),
    "wide": Case((2, 16, 3, 272)),
    "two-channels": Case((2, 2, 24, 50), "channels-last"),
    "channels-last": Case((2, 19, 8, 12), "channels-last"),
    "channels-last-aligned": Case((2, 48, 6, 6), "channels-last"),
    "strided": Case((2, 16, 6, 10), "strided"),
    "transposed": Case((2, 16, 6, 10), "transposed"),
    "cropped": Case((2, 16, 6, 10), "cropped"),
    "apart": Case((2, 16, 8, 12), "apart", "contiguous"),
    "slice": Case((2, 16, 8, 12), "slice"),
    "channels-last-slice": Case((2, 19, 8, 12), "channels-last-slice"),
    "layouts-differ": Case((2, 16, 8, 12), "channels-last", "slice"),
    "expanded-gradient": Case((2, 16, 8, 12), "contiguous", "expanded"),
    "many-images": Case((65, 16, 1, 2)),
    "small-maps": Case((9, 20, 7, 7)),
    "revbifpn": Case((2, 48, 56, 56)),
    "programs-share-planes": Case((1, 16, 96, 96)),
}


@pytest.fixture
def several_images(monkeypatch):
    """A GPU that few programs fill: each walks through several images."""
    monkeypatch.setattr(tiles, "PROGRAMS", 2)
    tiles._plan.cache_clear()
    yield
    tiles._plan.cache_clear()


class Backend:
    """One implementation of the ops, with the arguments of the schemas."""

    def __init__(self, device: str, functions: dict[str, Callable]) -> None:
        self.device, self._functions = device, functions

    def __getattr__(self, op: str) -> Callable:
        return leaves_alone(self._functions[op])

    def batch_statistics(self, x, running=(None, None, None), momentum=0.1):
        function = self._functions["batch_statistics"]

        def called(running, x):
            return function(x, EPS, *running, momentum)

        # Running statistics are written to: they come first, where the guard does not look.
        return leaves_alone(called, outputs=1)(running, x)


# C++ through the dispatcher; Triton by its launchers.
_LAUNCHERS = {
    "batch_statistics": batch_statistics_cuda,
    "norm_act": _norm_act_cuda,
    "norm_act_means": norm_act_means_cuda,
    "norm_act_sums": norm_act_sums_cuda,
    "norm_act_grad": norm_act_grad_cuda,
    "norm_act_input_grad": norm_act_input_grad_cuda,
}
TRITON = {op: on_this_machine(launcher) for op, launcher in _LAUNCHERS.items()}
CPP = {op: getattr(torch.ops.revbifpn, op) for op in TRITON}
BACKENDS = {"cpp": Backend("cpu", CPP), "triton": Backend("cuda" if HAS_GPU else "cpu", TRITON)}
# Without a GPU kernels are slow: every way through them comes up by default, in one dtype.
_QUICK_TRITON = [
    ("odd", "fp32"),
    ("channels-last-aligned", "fp16"),
    ("cropped", "fp32"),
    ("apart", "fp32"),
    ("channels-last-slice", "fp32"),
    ("layouts-differ", "bf16"),
    ("many-images", "fp32"),
]


def _cpp_pairs():
    """By default two dtypes per case, which take turns."""
    for k, case in enumerate(CASES):
        for j, dtypes in enumerate(DTYPES):
            # The real shape is large, and its dtypes are the ones it has in training.
            if case != "revbifpn" or dtypes in ("fp32", "bf16"):
                yield case, dtypes, () if (j + k) % 2 == 0 else pytest.mark.slow


def _triton_pairs():
    yield from ((*pair, ()) for pair in _QUICK_TRITON)
    for k, case in enumerate(CASES):
        # Of two channels chance decides the largest error, so half precision is left out.
        pair = case, "fp32" if case == "two-channels" else ("fp32", "bf16", "fp16")[k % 3]
        if case != "revbifpn" and case not in dict(_QUICK_TRITON):
            yield *pair, EMULATED


over_grid = pytest.mark.parametrize(
    ("backend", "case", "dtypes"),
    [
        pytest.param(
            *(BACKENDS[backend], CASES[case], dtypes), id=f"{backend}-{case}-{dtypes}", marks=marks
        )
        for backend, pairs in (("cpp", _cpp_pairs()), ("triton", _triton_pairs()))
        for case, dtypes, marks in pairs
    ],
)
over_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
