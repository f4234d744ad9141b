"""RevSilo: reversible fusion of feature maps of several resolutions, in both directions.

The paper's symbols (arXiv 2206.14098, additive coupling) and ours, level 0 the finest:

    down half   y_j = x_j + Σ_{i<j} R(F_ij(x_i))      F_ij = edges[(i, j)], i < j
    up half     z_i = y_i + Σ_{j>i} R(G_ji(y_j))      G_ji = edges[(j, i)], j > i

R resamples to the target's size inside the kernel that adds. Each level of a half is one
`resample_add` forward, and one `resample_undo` backward: inputs and source gradients together.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .ops import resample_adjoint
from .ops.checks import (
    MAX_SOURCES,
    check_lattice,
    check_maps,
    check_mode,
    check_precision,
    check_size,
)
from .ops.resample.folded_norm import fuse, maps_of, undo
from .reversible import Reversible, Step
from .reversible.recompute import run_transform

Edge = tuple[int, int]


class Fusion(NamedTuple):
    """All edges onto one level in one half."""

    target: int
    edges: tuple[Edge, ...]


class RevSilo(Reversible):
    """Adds to each level transforms of the others; invertible, whatever the transforms are.

    `silo(x_0, …)` returns the streams z_0, …; `silo.inverse(z_0, …)` returns x_0, … again. Streams
    are (N, C_l, H_l, W_l), any sizes, level 0 the finest. Fewer streams than levels may go in: the
    last levels are then created, y_j = Σ R(F_ij(x_i)), at the size that the first edge onto them
    returns; no down edge may start at them. With `inputs` given, a missing stream raises an error.

    Args:
        edges: (i, j) → module that maps stream i to (N, C_j, h, w), at any size that R takes to
            stream j's: no larger, or larger by whole factors. i < j: down half; i > j: up half.
        mode: How R enlarges: "bilinear" (`align_corners=False`) or "nearest".
        lattice: Exact mode, see `ReversibleSequential`.
        inputs: How many streams go in, if fewer than levels; `inverse` returns as many.
        reversible: False trains under plain autograd; may be switched at any time.

    Raises:
        TypeError, ValueError: Edges, mode or lattice do not fit; the message names which.
    """

    is_additive = True

    def __init__(
        self,
        edges: Mapping[Edge, nn.Module],
        mode: str = "bilinear",
        lattice: float | None = None,
        *,
        inputs: int | None = None,
        reversible: bool = True,
    ) -> None:
        super().__init__()
        _check_edges(edges)
        check_mode("RevSilo", mode)
        check_lattice("RevSilo", lattice, torch.float32)
        self.levels = 1 + max(level for edge in edges for level in edge)
        if inputs is not None and not 1 <= inputs <= self.levels:
            raise ValueError(f"RevSilo: inputs must be 1 to {self.levels} streams, got {inputs}")
        self.inputs = inputs
        self.mode, self.lattice, self.reversible = mode, lattice, reversible
        down, up = _halves(edges)
        self.down = nn.ModuleDict({_key(edge): edges[edge] for edge in down})
        self.up = nn.ModuleDict({_key(edge): edges[edge] for edge in up})
        # In this order autograd through `forward` adds gradients as `backward_step` does.
        self.down_fusions = _fusions(down)[::-1]
        self.up_fusions = _fusions(up)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode!r}, lattice={self.lattice}"

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        self._check_streams(xs, self.inputs)
        ys = list(xs) + [None] * (self.levels - len(xs))
        for fusion in self.down_fusions:
            ys[fusion.target] = self._fuse(fusion, ys[fusion.target], xs)
        for fusion in self.up_fusions:
            ys[fusion.target] = self._fuse(fusion, ys[fusion.target], ys)
        return tuple(ys)

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        self._check_streams(ys, self.levels)
        streams = list(ys)
        inputs = self.inputs or self.levels
        for fusion in (*self.up_fusions[::-1], *self.down_fusions[::-1]):
            if fusion.edges[0][0] > fusion.target or fusion.target < inputs:
                y = streams[fusion.target]
                streams[fusion.target] = self._fuse(fusion, y, streams, alpha=-1.0)
        return tuple(streams[:inputs])

    def backward_step(
        self, ys: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        inputs = len(step.needs_grad)
        streams, grads = ys, _Gradients(grad_ys)
        with step.recomputing():
            for fusion in self.up_fusions[::-1]:
                self._undo(fusion, streams, grads, step, [True] * self.levels, self.levels)
            for fusion in self.down_fusions[::-1]:
                self._undo(fusion, streams, grads, step, step.needs_grad, inputs)
        needed = zip(grads.totals, step.needs_grad, strict=False)
        return streams[:inputs], [grad if is_needed else None for grad, is_needed in needed]

    def _fuse(self, fusion: Fusion, x: Tensor | None, streams, alpha: float = 1.0):
        """x + α·Σ R(transformed streams); without x, the sum alone: a new level."""
        outputs = []
        for edge in fusion.edges:
            name, module, x_i = f"edge {edge}", self._module(edge), streams[edge[0]]
            output = run_transform(self, name, module, x_i, folds_norm=True)
            like = maps_of(outputs[0]) if outputs and x is None else x
            self._check_output(edge, maps_of(output), like)
            outputs.append(output)
        if x is None:
            x = torch.zeros_like(maps_of(outputs[0]), dtype=streams[0].dtype)
        return fuse(x, outputs, alpha=alpha, mode=self.mode, lattice=self.lattice)

    def _undo(self, fusion: Fusion, streams, grads: "_Gradients", step, needs_grad, inputs) -> None:
        """Undo a fusion: restore its target, add the gradients of its edges' sources."""
        target = fusion.target
        y, grad = streams[target], grads.totals[target]
        reruns = []
        for edge in fusion.edges:
            name, module, x = f"edge {edge}", self._module(edge), streams[edge[0]]
            reruns.append(
                step.rerun(name, module, x, needs_grad=needs_grad[edge[0]], folds_norm=True)
            )
        outputs = [rerun.output for rerun in reruns]
        options = {"mode": self.mode, "lattice": self.lattice}
        source_grads: Sequence[Tensor | None] = [None] * len(outputs)
        if grad is not None and target < inputs:
            streams[target], source_grads = undo(y, grad, outputs, **options)
        elif grad is not None:
            source_grads = _adjoint(grad, list(map(maps_of, outputs)), self.mode)
        elif target < inputs:
            streams[target] = fuse(y, outputs, alpha=-1.0, **options)
        del y, outputs
        # Last edge first, as autograd does: the same sums in the same order.
        for edge in fusion.edges[::-1]:
            grads.add(edge[0], reruns.pop().backward(source_grads[len(reruns)]))

    def _module(self, edge: Edge) -> nn.Module:
        return (self.down if edge[0] < edge[1] else self.up)[_key(edge)]

    def _check_streams(self, streams: Sequence[Tensor], expected: int | None) -> None:
        count = len(streams)
        if count != expected and (expected or not 1 <= count <= self.levels):
            fewer = "" if expected else ", or fewer (the last levels are then created)"
            raise ValueError(
                f"RevSilo: expected {expected or self.levels} streams{fewer}, got {count}"
            )
        for k, stream in enumerate(streams):
            check_maps("RevSilo", f"stream {k}", stream)
        for level in range(count, self.levels):
            self._check_created(level, count)

    def _check_created(self, level: int, count: int) -> None:
        edges = [edge for fusion in self.down_fusions for edge in fusion.edges]
        for edge in edges:
            if edge[0] == level:
                raise ValueError(
                    f"RevSilo: edge {edge} must start at a stream, and only {count} were given, so "
                    f"that level {level} is created here; expected down edges from levels below "
                    f"{count}, or {self.levels} streams"
                )
        if not any(edge[1] == level for edge in edges):
            raise ValueError(
                f"RevSilo: level {level} has neither a stream nor a down edge onto it; expected "
                f"{self.levels} streams, got {count}"
            )

    def _check_output(self, edge: Edge, output, x: Tensor | None) -> None:
        name = f"the result of edge {edge}"
        check_maps("RevSilo", name, output)
        if x is None:
            return
        if output.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"RevSilo: {name} must share (N, C) = {tuple(x.shape[:2])} with stream {edge[1]}, "
                f"got {tuple(output.shape)}"
            )
        check_size("RevSilo", name, output.shape[2:], x.shape[2:])
        check_precision("RevSilo", name, output.dtype, f"stream {edge[1]}", x.dtype)


class _Gradients:
    """Sums of gradients. Those given at first belong to autograd, so only sums made here are
    updated in place."""

    def __init__(self, totals: list[Tensor | None]) -> None:
        self.totals = totals
        self.is_ours = [False] * len(totals)

    def add(self, level: int, grad: Tensor | None) -> None:
        total = self.totals[level]
        if grad is None:
            return
        if total is None:
            self.totals[level] = grad
        elif self.is_ours[level]:
            total.add_(grad)
        else:
            self.totals[level], self.is_ours[level] = total + grad, True


def _adjoint(grad: Tensor, outputs: Sequence[Tensor], mode: str) -> list[Tensor]:
    """Rᵀ(grad) for each output, in its dtype."""
    if len({output.dtype for output in outputs}) > 1:
        return [_adjoint(grad, [output], mode)[0] for output in outputs]
    sizes = [tuple(output.shape[2:]) for output in outputs]
    return resample_adjoint(grad, sizes, mode=mode, dtype=outputs[0].dtype)


def _key(edge: Edge) -> str:
    return f"{edge[0]}_{edge[1]}"


def _halves(edges: Mapping[Edge, nn.Module]) -> tuple[list[Edge], list[Edge]]:
    """The edges of the down half and those of the up half, each ascending."""
    down = sorted(edge for edge in edges if edge[0] < edge[1])
    return down, sorted(edge for edge in edges if edge[0] > edge[1])


def _fusions(half: Sequence[Edge]) -> list[Fusion]:
    """One for each target, ascending, of one half's edges."""
    by_target: dict[int, list[Edge]] = {}
    for edge in half:
        by_target.setdefault(edge[1], []).append(edge)
    return [Fusion(target, tuple(by_target[target])) for target in sorted(by_target)]


def _check_edges(edges: Mapping[Edge, nn.Module]) -> None:
    if not isinstance(edges, Mapping) or not edges:
        raise TypeError(
            f"RevSilo: edges must be a mapping from (i, j) to modules, got {type(edges).__name__}"
            f"{'' if edges else ' without entries'}"
        )
    for edge, module in edges.items():
        is_pair = isinstance(edge, tuple) and len(edge) == 2
        if not is_pair or not all(type(level) is int and level >= 0 for level in edge):
            raise ValueError(
                f"RevSilo: an edge must be (i, j), levels from 0 (finest) on, got {edge!r}"
            )
        if edge[0] == edge[1]:
            raise ValueError(
                f"RevSilo: edge {edge} must join two levels, got one onto itself; a residual "
                "coupling within a level is a RevBlock"
            )
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"RevSilo: edge {edge} must be an nn.Module, got {type(module).__name__}"
            )
    for fusion in (fusion for half in _halves(edges) for fusion in _fusions(half)):
        if len(fusion.edges) > MAX_SOURCES:
            raise ValueError(
                f"RevSilo: at most {MAX_SOURCES} edges onto a level in a half, got "
                f"{len(fusion.edges)} onto level {fusion.target}"
            )
