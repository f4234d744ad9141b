"""The other parts of a chain: RevBlock, RevLevels, and Recomputed for what is not reversible.

RevBlock is the residual coupling of channel halves x = (a, b):

    b' = b + F(a)       b = b' − F(a)
    a' = a + G(b')      a = a' − G(b')
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .ops.checks import check_lattice, check_maps, check_precision
from .ops.resample.folded_norm import fuse, fuse_out, maps_of
from .reversible import Reversible, Step
from .reversible.recompute import run_transform
from .reversible.streams import finest_lattice
from .reversible.tape import compute_of


class RevBlock(Reversible):
    """Adds to each half of a stream's channels a transform of the other half.

    `(y,) = block(x)` and `(x,) = block.inverse(y)`, x and y of shape (N, C, H, W). The halves are
    channel slices of whole maps: without a graph nothing is chunked, joined or copied.

    Args:
        f: Maps the first C − C//2 channels to the other C//2, sides unchanged.
        g: Maps the last C//2 channels to the first C − C//2, sides unchanged.
        lattice: Exact mode, see `ReversibleSequential`.
        reversible: False trains under plain autograd; may be switched at any time.

    Raises:
        ValueError: The lattice is not a power of two.
    """

    is_additive = True

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        lattice: float | None = None,
        *,
        reversible: bool = True,
    ) -> None:
        super().__init__()
        check_lattice("RevBlock", lattice, torch.float32)
        self.f, self.g = f, g
        self.lattice, self.reversible = lattice, reversible

    def forward(self, x: Tensor) -> tuple[Tensor]:
        (a, b), y, (a_out, b_out) = _halves_and_room(x)
        b = self._added(b, "f", a, b_out)
        a = self._added(a, "g", b, a_out)
        return (torch.cat([a, b], dim=1) if y is None else y,)

    def inverse(self, y: Tensor) -> tuple[Tensor]:
        (a, b), x, (a_out, b_out) = _halves_and_room(y)
        a = self._added(a, "g", b, a_out, alpha=-1.0)
        b = self._added(b, "f", a, b_out, alpha=-1.0)
        return (torch.cat([a, b], dim=1) if x is None else x,)

    def backward_step(
        self, ys: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        (y,), (grad_y,) = ys, grad_ys
        if grad_y is None:
            with step.recomputing():
                return list(self.inverse(y)), [None]
        x, grad_x = torch.empty_like(y), torch.empty_like(grad_y)
        (a_out, b_out), (a, b) = _halves(y), _halves(x)
        (grad_a_out, grad_b_out), (grad_a, grad_b) = _halves(grad_y), _halves(grad_x)
        with step.recomputing():
            self._undo("g", a_out, b_out, a, grad_a_out, grad_b_out, grad_b, step)
            self._undo("f", b_out, a, b, grad_b, grad_a_out, grad_a, step)
        return [x], [grad_x if step.needs_grad[0] else None]

    def _undo(self, name, y, source, x, grad, grad_source, total, step: Step) -> None:
        """x = y − T(source); total = grad_source + the gradient through T."""
        needs_grad = name == "g" or step.needs_grad[0]
        module = getattr(self, name)
        rerun = step.rerun(name, module, source, needs_grad=needs_grad, folds_norm=True)
        fuse_out(y, [rerun.output], x, alpha=-1.0, lattice=self.lattice)
        result = maps_of(rerun.output)
        if not getattr(module, "reads_slices", False) or result.dtype != y.dtype:
            # Dense and of the transform's precision: batch norm's backward is slow on slices.
            grad = torch.empty_like(result).copy_(grad)
        grad_through = rerun.backward(grad)
        if grad_through is None:
            total.copy_(grad_source)
        else:
            torch.add(grad_source, grad_through, out=total)

    def _added(self, x: Tensor, name: str, source: Tensor, out: Tensor | None, alpha=1.0) -> Tensor:
        """x + α·T(source) for T the transform `name`; written to `out` if it is given."""
        module = getattr(self, name)
        output = run_transform(self, name, module, source, folds_norm=True)
        result = maps_of(output)
        check_maps("RevBlock", f"the result of {name}", result)
        if result.shape != x.shape:
            raise ValueError(
                f"RevBlock: the result of {name} must have the shape of the half that it is added "
                f"to, {tuple(x.shape)}, got {tuple(result.shape)}"
            )
        check_precision("RevBlock", f"the result of {name}", result.dtype, "stream", x.dtype)
        if out is None:
            return fuse(x, [output], alpha=alpha, lattice=self.lattice)
        fuse_out(x, [output], out, alpha=alpha, lattice=self.lattice)
        return out


class RevLevels(Reversible):
    """A reversible block for each stream, side by side: `(y_0, …) = levels(x_0, …)`.

    Args:
        blocks: One for each level, each of one stream, such as `RevBlock`.

    Raises:
        TypeError, ValueError: A block is not a `Reversible`, or is given twice.
    """

    def __init__(self, *blocks: Reversible, reversible: bool = True) -> None:
        super().__init__()
        for level, block in enumerate(blocks):
            if not isinstance(block, Reversible):
                raise TypeError(
                    f"RevLevels: block {level} must be a Reversible, got {type(block).__name__}"
                )
        if len(set(blocks)) < len(blocks):
            raise ValueError(
                "RevLevels: expected a block of its own for each level, got one twice; two blocks "
                "may share their transforms"
            )
        self.levels = nn.ModuleList(blocks)
        self.reversible = reversible

    @property
    def lattice(self) -> float | None:
        """The finest lattice of the levels; setting it sets that of every level."""
        return finest_lattice(self.levels)

    @lattice.setter
    def lattice(self, lattice: float | None) -> None:
        for block in self.levels:
            block.lattice = lattice

    @property
    def is_additive(self) -> bool:
        return all(block.is_additive for block in self.levels)

    def members(self) -> Sequence[Reversible]:
        return list(self.levels)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(compute_of(block)(block, x)[0] for block, x in self._pairs(xs))

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        return tuple(block.inverse(y)[0] for block, y in self._pairs(ys))

    def backward_step(
        self, ys: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        grads = list(grad_ys)
        for level, block in enumerate(self.levels):
            inner = step.of_member(block, step.needs_grad[level : level + 1])
            (ys[level],), (grads[level],) = block.backward_step([ys[level]], [grads[level]], inner)
        return ys, grads

    def _pairs(self, streams: Sequence[Tensor]) -> zip:
        if len(streams) != len(self.levels):
            raise ValueError(f"RevLevels: expected {len(self.levels)} streams, got {len(streams)}")
        return zip(self.levels, streams, strict=True)


class Recomputed(Reversible):
    """A computation without an inverse: saves its inputs, and runs again in the backward.

    Subclass it and define `forward(*xs)`, which returns a tuple; submodules may hold batch norms,
    dropout, anything. Unlike under `torch.utils.checkpoint`, running statistics change once per
    step. In a `ReversibleSequential` the block before it need not save its outputs.

    Attributes:
        reversible: False trains under plain autograd, which stores activations.
    """

    keeps_inputs = True

    def inverse(self, *ys: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(f"{type(self).__name__}: has no inverse")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    check_maps("RevBlock", "stream 0", x)
    if x.shape[1] < 2:
        raise ValueError(f"RevBlock: stream 0 must have at least 2 channels, got {tuple(x.shape)}")
    return x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], dim=1)


def _halves_and_room(x: Tensor):
    """The halves of x; if no graph is made, also memory for the result and its halves."""
    # The compiler fuses by itself, and exported programs must not write to slices.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or is_traced:
        return _halves(x), None, (None, None)
    room = torch.empty_like(x)
    return _halves(x), room, _halves(room)
