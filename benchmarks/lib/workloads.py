"""What bench_ops times, as data: inputs, our ops, the rivals, the bytes that must move."""

import argparse
import functools
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import revbifpn_kernels as ours

LEVELS = (1, 2, 3)  # the coarser levels that a silo's level 0 is fused from
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+bf16": (torch.float32, torch.bfloat16),  # fp32 stream, transforms under autocast
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
Shape = tuple[int, int, int, int]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One set of inputs."""

    name: str
    shape: Shape
    dtype: str
    layout: str
    threads: int
    compiles: bool = False  # whether the compiler is a rival, which takes minutes

    def __str__(self) -> str:
        return (
            f"{self.dtype} {self.layout} {'x'.join(map(str, self.shape))} {self.threads} thread(s)"
        )


@dataclass
class Inputs:
    """A level-0 stream, its gradient, and the sources at 1/2, 1/4 and 1/8 of its side."""

    x: Tensor
    grad: Tensor
    sources: list[Tensor]

    @classmethod
    def make(cls, case: Case, device: str) -> "Inputs":
        """Normally distributed values: no op's time depends on them."""
        n, c, h, w = case.shape
        x_dtype, source_dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def maps(level: int, dtype: torch.dtype) -> Tensor:
            size = (n, c, max(h >> level, 1), max(w >> level, 1))
            values = torch.randn(size, generator=generator, device=device)
            return values.to(dtype, memory_format=LAYOUTS[case.layout])

        sources = [maps(level, source_dtype) for level in LEVELS]
        return cls(maps(0, x_dtype), maps(0, x_dtype), sources)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(source.shape[2:]) for source in self.sources]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(change(self.x), change(self.grad), [change(s) for s in self.sources])

    def with_x(self, x: Tensor) -> "Inputs":
        return Inputs(x, self.grad, self.sources)


def _resampled(x: Tensor, sources: list[Tensor], sign: int = 1) -> Tensor:
    for source in sources:
        enlarged = F.interpolate(source, size=x.shape[2:], mode="bilinear")
        x = torch.add(x, enlarged, alpha=sign)
    return x


def _eager_add_(inputs: Inputs) -> Outputs:
    for source in inputs.sources:
        inputs.x.add_(F.interpolate(source, size=inputs.x.shape[2:], mode="bilinear"))
    return (inputs.x,)


def _upsample_backward(grad: Tensor, sources: list[Tensor]) -> Outputs:
    """What autograd runs; neither compiler nor CUDA graph takes an autograd graph from outside."""
    size = grad.shape[2:]
    return tuple(
        torch.ops.aten.upsample_bilinear2d_backward(grad.to(s.dtype), size, s.shape, False)
        for s in sources
    )


def _eager_undo(inputs: Inputs) -> Outputs:
    x = _resampled(inputs.x, inputs.sources, -1)
    return (x, *_upsample_backward(inputs.grad, inputs.sources))


def _ours_adjoint(inputs: Inputs) -> Outputs:
    dtype = inputs.sources[0].dtype
    return tuple(ours.resample_adjoint(inputs.grad, inputs.sizes, dtype=dtype))


def _ours_undo(inputs: Inputs) -> Outputs:
    x, grads = ours.resample_undo(inputs.x, inputs.grad, inputs.sources)
    return (x, *grads)


@dataclass(frozen=True)
class Op:
    """One op with its rivals; `streams` and `pyramids` count the passes over x and all sources."""

    name: str
    mode: str
    outputs: tuple[str, ...]
    streams: int
    pyramids: int
    ours: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    compiled: Callable[[Tensor, Tensor, list[Tensor]], Outputs] | None = None

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")

    @property
    def allocates_stream(self) -> bool:
        return not self.in_place and self.mode != "bwd"

    def bytes_moved(self, inputs: Inputs) -> int:
        pyramid = sum(source.nbytes for source in inputs.sources)
        return self.streams * inputs.x.nbytes + self.pyramids * pyramid


_GRADS = ("grad_2", "grad_4", "grad_8")
ADD = Op(
    "resample_add", "fwd", ("y",), 2, 1,
    lambda inputs: (ours.resample_add(inputs.x, inputs.sources),),
    lambda inputs: (_resampled(inputs.x, inputs.sources),),
    lambda x, grad, sources: (_resampled(x, sources),),
)  # fmt: skip
ADD_ = Op(
    "resample_add_", "fwd", ("x",), 2, 1,
    lambda inputs: (ours.resample_add_(inputs.x, inputs.sources),),
    _eager_add_,
    lambda x, grad, sources: (x.copy_(_resampled(x, sources)),),
)  # fmt: skip
INVERSE = Op(  # the rivals' inverse is their forward with another sign
    "resample_add", "inverse", ("x",), 2, 1,
    lambda inputs: (ours.resample_add(inputs.x, inputs.sources, alpha=-1.0),),
    lambda inputs: (_resampled(inputs.x, inputs.sources, -1),),
)  # fmt: skip
ADJOINT = Op(
    "resample_adjoint", "bwd", _GRADS, 1, 1, _ours_adjoint,
    lambda inputs: _upsample_backward(inputs.grad, inputs.sources),
    lambda x, grad, sources: _upsample_backward(grad, sources),
)  # fmt: skip
UNDO = Op(
    "resample_undo", "inverse+bwd", ("x", *_GRADS), 3, 2, _ours_undo, _eager_undo,
    lambda x, grad, sources: (_resampled(x, sources, -1), *_upsample_backward(grad, sources)),
)  # fmt: skip
OPS = (ADD, ADD_, INVERSE, ADJOINT, UNDO)
S6, S0 = (28, 320, 88, 88), (1, 48, 56, 56)  # level 0, beyond the caches and in one core's


# Who is compiled on GPUs: name, dtype, layout.
COMPILED = {
    ("S6", "fp32", "nchw"),
    ("S6", "bf16", "nchw"),
    ("S6", "fp32", "channels_last"),
    ("S0, one image", "fp32", "nchw"),
}


def _cases(name: str, shape: Shape, threads: int, compiled: Collection = ()) -> list[Case]:
    """A shape in every dtype and layout."""
    return [
        Case(name, shape, dtype, layout, threads, (name, dtype, layout) in compiled)
        for dtype, layout in itertools.product(DTYPES, LAYOUTS)
    ]


def cpu_cases(threads: int) -> list[Case]:
    """S6's level 0; S0's on one thread."""
    return _cases("S6", S6, threads, {("S6", "fp32", "nchw")}) + _cases("S0", S0, 1)


def cuda_cases(threads: int) -> list[Case]:
    """Level 0 of S6, S4, S0 at batches several times the L2; and one image, bound by launches."""
    shapes = {"S6": (32, *S6[1:]), "S4": (64, 192, 80, 80), "S0": (512, *S0[1:])}
    shapes["S0, one image"] = S0
    return [case for pair in shapes.items() for case in _cases(*pair, threads, COMPILED)]


def quick_cases(threads: int) -> list[Case]:
    """A quarter of S6's batch in the dtypes and layouts that differ most."""
    cases = _cases("S6, a quarter of the batch", (7, *S6[1:]), threads)
    return [c for c in cases if c.layout == "nchw" or c.dtype == "fp32"]


def cases_of(run: argparse.Namespace) -> list[Case]:
    """What the options of bench_ops ask for."""
    if run.shapes:
        return [case for shape in run.shapes for case in _cases("given", shape, run.threads)]
    if run.quick:
        return quick_cases(run.threads)
    return (cuda_cases if run.device == "cuda" else cpu_cases)(run.threads)


@functools.cache
def empty_op() -> Callable[..., Tensor]:
    """A custom op with `resample_add`'s schema that allocates its result and does nothing else."""
    library = torch.library.Library("revbifpn_bench", "DEF")
    library.define(
        "empty(Tensor x, Tensor[] sources, Tensor[] scales, Tensor[] shifts, float alpha, "
        "str mode, float? lattice) -> Tensor"
    )
    for key in ("CPU", "CUDA"):
        library.impl("empty", lambda x, *_: torch.empty_like(x), key)
    empty_op.library = library  # the registration ends with its Library object
    return torch.ops.revbifpn_bench.empty
