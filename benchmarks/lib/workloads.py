"""What bench_ops measures, as data: inputs, ours, the rivals, the bytes that must move."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import revbifpn_kernels as ours

from .photos import feature_maps

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
    """One set of inputs, and who is timed on it."""

    name: str
    shape: Shape
    dtype: str
    layout: str
    threads: int
    rivals: tuple[str, ...] = ("torch",)

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {self.shape_text} {self.threads} thread(s)"


@dataclass
class Inputs:
    """A level-0 stream, its gradient, and the sources at 1/2, 1/4 and 1/8 of its side."""

    x: Tensor
    grad: Tensor
    sources: list[Tensor]

    @classmethod
    def make(cls, case: Case, device: str) -> "Inputs":
        n, c, h, w = case.shape
        x_dtype, source_dtype = DTYPES[case.dtype]

        def maps(level: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
            size = (max(h >> level, 1), max(w >> level, 1))
            features = feature_maps(n, c, size, level=level, shift=shift, device=device)
            return features.to(dtype, memory_format=LAYOUTS[case.layout])

        sources = [maps(level, source_dtype) for level in LEVELS]
        return cls(maps(0, x_dtype), maps(0, x_dtype, shift=1), sources)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(source.shape[2:]) for source in self.sources]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(change(self.x), change(self.grad), [change(s) for s in self.sources])

    def with_x(self, x: Tensor) -> "Inputs":
        return Inputs(x, self.grad, self.sources)

    @functools.cached_property
    def graph(self) -> tuple[list[Tensor], Tensor]:
        """Eager's forward with gradients wanted, so that its backward can be timed alone."""
        leaves = [source.detach().requires_grad_() for source in self.sources]
        with torch.enable_grad():
            return leaves, _eager_sum(self.x, leaves)


def _eager_sum(x: Tensor, sources: list[Tensor]) -> Tensor:
    for source in sources:
        x = x + F.interpolate(source, size=x.shape[2:], mode="bilinear")
    return x


def _eager_difference(y: Tensor, sources: list[Tensor]) -> Tensor:
    for source in sources:
        y = y - F.interpolate(source, size=y.shape[2:], mode="bilinear")
    return y


def _eager_add(inputs: Inputs) -> Outputs:
    return (_eager_sum(inputs.x, inputs.sources),)


def _eager_add_(inputs: Inputs) -> Outputs:
    for source in inputs.sources:
        inputs.x.add_(F.interpolate(source, size=inputs.x.shape[2:], mode="bilinear"))
    return (inputs.x,)


def _eager_inverse(inputs: Inputs) -> Outputs:
    return (_eager_difference(inputs.x, inputs.sources),)


def _eager_adjoint(inputs: Inputs) -> Outputs:
    leaves, y = inputs.graph
    return torch.autograd.grad(y, leaves, inputs.grad, retain_graph=True)


def _eager_undo(inputs: Inputs) -> Outputs:
    return (*_eager_inverse(inputs), *_eager_adjoint(inputs))


def _upsample_backward(grad: Tensor, sources: list[Tensor]) -> Outputs:
    """What autograd runs for `_eager_sum`; the compiler takes no autograd graph from outside."""
    size = grad.shape[2:]
    return tuple(
        torch.ops.aten.upsample_bilinear2d_backward(grad.to(s.dtype), size, s.shape, False)
        for s in sources
    )


def _compiled_add(x: Tensor, grad: Tensor, sources: list[Tensor]) -> Outputs:
    return (_eager_sum(x, sources),)


def _compiled_add_(x: Tensor, grad: Tensor, sources: list[Tensor]) -> Outputs:
    return (x.copy_(_eager_sum(x, sources)),)


def _compiled_adjoint(x: Tensor, grad: Tensor, sources: list[Tensor]) -> Outputs:
    return _upsample_backward(grad, sources)


def _compiled_undo(x: Tensor, grad: Tensor, sources: list[Tensor]) -> Outputs:
    return (_eager_difference(x, sources), *_upsample_backward(grad, sources))


def _ours_add(inputs: Inputs) -> Outputs:
    return (ours.resample_add(inputs.x, inputs.sources),)


def _ours_add_(inputs: Inputs) -> Outputs:
    return (ours.resample_add_(inputs.x, inputs.sources),)


def _ours_inverse(inputs: Inputs) -> Outputs:
    return (ours.resample_add(inputs.x, inputs.sources, alpha=-1.0),)


def _ours_adjoint(inputs: Inputs) -> Outputs:
    dtype = inputs.sources[0].dtype
    return tuple(ours.resample_adjoint(inputs.grad, inputs.sizes, dtype=dtype))


def _ours_undo(inputs: Inputs) -> Outputs:
    x, grads = ours.resample_undo(inputs.x, inputs.grad, inputs.sources)
    return (x, *grads)


@dataclass(frozen=True)
class Op:
    """A row: `streams` and `pyramids` count the passes over x and over all sources."""

    name: str
    mode: str
    ours: Callable[[Inputs], Outputs]
    eager: Callable[[Inputs], Outputs]
    compiled: Callable[[Tensor, Tensor, list[Tensor]], Outputs] | None
    outputs: tuple[str, ...]
    streams: int
    pyramids: int
    allocates_stream: bool

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")

    def bytes_moved(self, inputs: Inputs) -> int:
        pyramid = sum(source.nbytes for source in inputs.sources)
        return self.streams * inputs.x.nbytes + self.pyramids * pyramid


_GRADS = ("grad_2", "grad_4", "grad_8")
OPS = (
    Op("resample_add", "fwd", _ours_add, _eager_add, _compiled_add, ("y",), 2, 1, True),
    Op("resample_add_", "fwd", _ours_add_, _eager_add_, _compiled_add_, ("x",), 2, 1, False),
    # The rivals' inverse is their forward with another sign.
    Op("resample_add", "inverse", _ours_inverse, _eager_inverse, None, ("x",), 2, 1, True),
    Op(
        "resample_adjoint",
        "bwd",
        _ours_adjoint,
        _eager_adjoint,
        _compiled_adjoint,
        _GRADS,
        1,
        1,
        False,
    ),
    Op(
        "resample_undo",
        "inverse+bwd",
        _ours_undo,
        _eager_undo,
        _compiled_undo,
        ("x", *_GRADS),
        3,
        2,
        True,
    ),
)


def cpu_cases(threads: int) -> list[Case]:
    """S6's level 0 beyond the caches, in every dtype and layout, and S0's inside one core's."""
    big, small = (28, 320, 88, 88), (1, 48, 56, 56)
    cases = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            compiled = ("torch", "compile") if (dtype, layout) == ("fp32", "nchw") else ("torch",)
            cases.append(Case("S6", big, dtype, layout, threads, compiled))
            if threads > 1 and dtype != "fp32+bf16":
                cases.append(Case("S6", big, dtype, layout, 1, ()))
            cases.append(Case("S0", small, dtype, layout, 1))
    return cases


def cuda_cases(threads: int) -> list[Case]:
    """Level 0 of S0, S4 and S6 at batches several times the L2; and one image, bound by launches.

    The compiler is a rival where its minutes allow.
    """
    shapes = {
        "S6": (32, 320, 88, 88),
        "S4": (64, 192, 80, 80),
        "S0": (512, 48, 56, 56),
        "S0, one image": (1, 48, 56, 56),
    }
    compiled = {
        ("S6", "fp32", "nchw"),
        ("S6", "bf16", "nchw"),
        ("S6", "fp32", "channels_last"),
        ("S0, one image", "fp32", "nchw"),
    }

    def case(name: str, dtype: str, layout: str) -> Case:
        compiles = ("compile",) if (name, dtype, layout) in compiled else ()
        return Case(name, shapes[name], dtype, layout, threads, ("torch", *compiles))

    return [case(*names) for names in itertools.product(shapes, DTYPES, LAYOUTS)]


def quick_cases(threads: int) -> list[Case]:
    """Small enough for a first look: no figure of these is worth quoting."""
    return [
        Case("S0", (16, 48, 56, 56), dtype, layout, threads)
        for dtype in DTYPES
        for layout in LAYOUTS
    ]


def cases_for_shapes(shapes: list[Shape], threads: int) -> list[Case]:
    return [
        Case("given", shape, dtype, layout, threads)
        for shape in shapes
        for dtype in DTYPES
        for layout in LAYOUTS
    ]


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
