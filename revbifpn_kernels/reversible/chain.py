"""The engine: chains of invertible blocks whose backward needs no stored activations.

Each block of a forward call is one autograd Function, so its parameters' gradients appear as soon
as they are known. The blocks share a tape: the last one saves its outputs; in the backward every
block takes its outputs from the tape, restores its inputs, differentiates one transform at a time
and puts the inputs on the tape for the block before. What is held does not grow with depth.

    y = block(x)        forward      saves nothing, but in the last block y
    x = block⁻¹(y)      backward     and dL/dx, dL/dθ from dL/dy, by `backward_step`
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.checks import check_lattice
from ..ops.layout import Geometry
from .recompute import Replay, Step, Tracked, is_replaying, sharing
from .recompute.checks import check_inverse, check_range, tuple_of_streams
from .streams import Streams, enter, finest_lattice, identity, readable


class Reversible(nn.Module):
    """A block whose inputs can be computed from its outputs. Subclass it, define two methods.

    `forward(*xs)` is plain differentiable computation that returns a tuple of streams, `inverse`
    takes it back, calling submodules in the opposite order. Called in a `ReversibleSequential` or
    alone, the block then trains without storing activations: alone it keeps its outputs, in a
    sequence not even those. Submodules may hold batch norms, dropout, anything: their second run
    repeats the first.

    Attributes:
        reversible: False trains under plain autograd, which stores activations.
        lattice: Exact mode: a power of two of which all streams are multiples, or None. A block of
            your own must add by `resample_add(b, [f(a)], lattice=self.lattice)` to keep them so.
        check: True compares `inverse` with `forward` in each call, runs every transform twice, and
            raises if they differ, or if a stream leaves the lattice's range. Switch it on once
            after writing a block: it is slow and waits for the device.
        keeps_inputs: True for what cannot be taken back, see `Recomputed`.
        reruns_before: True for a block that keeps no inputs after another one that does: in the
            backward that one is run a third time to compute them.
    """

    reversible: bool = True
    keeps_inputs: bool = False
    reruns_before: bool = False
    lattice: float | None = None
    check: bool = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.forward, "compute"):
            cls.forward = _run_by_engine(cls.forward)

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if isinstance(value, nn.Module) and self.calls_transforms and is_replaying(self):
            return Tracked(self, name, value)
        return value

    @property
    def calls_transforms(self) -> bool:
        """Whether `forward` calls submodules itself, and `backward_step` is the general one."""
        return type(self).backward_step is Reversible.backward_step

    def forward(self, *xs: Tensor) -> Streams:
        """Return the outputs; plain computation, differentiable by autograd."""
        raise NotImplementedError(f"{type(self).__name__}: forward must be defined")

    def inverse(self, *ys: Tensor) -> Streams:
        """Return the inputs of `forward` from its outputs."""
        raise NotImplementedError(f"{type(self).__name__}: inverse must be defined")

    def __prepare_scriptable__(self):
        """Raise: `torch.jit.script` calls this first, and could not compile `forward`."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; use torch.compile, or "
            "torch.export.export of a model in evaluation"
        )

    def members(self) -> Sequence["Reversible"]:
        """Blocks within this one whose `forward` and `backward_step` are parts of its own."""
        return ()

    def backward_step(
        self, ys: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Return the inputs and their gradients; parameters' gradients go to `step`.

        This one works for every block: `inverse`, then autograd through the whole of `forward`.
        Override it to restore and differentiate together, one transform at a time, by `step.rerun`.

        Args:
            ys: The outputs of `forward`, or the inputs where those are kept; the list is the step's
                own, its tensors are not.
            grad_ys: Their gradients, None where nothing depends on an output.
            step: Runs transforms again; collects gradients.
        """
        xs: Sequence[Tensor] = ys
        if not self.keeps_inputs:
            with step.replay.second(is_reversed=True):
                xs = tuple_of_streams(self, self.inverse(*ys), "inverse", len(step.needs_grad))
        leaves = [x.detach().requires_grad_(n) for x, n in zip(xs, step.needs_grad, strict=True)]
        with step.replay.second(), torch.enable_grad():
            outputs = compute_of(self)(self, *leaves)
        return xs, step.differentiate(self, outputs, leaves, grad_ys)


class Tape:
    """One forward call of a chain: hands restored streams from one block's backward to the next."""

    def __init__(self, blocks: int, check: bool) -> None:
        self.blocks = blocks
        self.check = check
        self.first: int | None = None  # the first block that keeps a graph
        self.outputs: dict[int, list[Tensor]] = {}
        # In the forward, of the block before if it keeps its inputs: its call, and these.
        self.before: tuple[_Call, Streams] | None = None
        self.last: list[tuple] | None = None  # what the block before returned, in the forward

    def check_unchanged(self, index: int, block: nn.Module, xs: Streams) -> None:
        """Raise unless the inputs are what the block before returned: it will be restored so."""
        if self.last is not None and self.last != [identity(x) for x in xs]:
            raise RuntimeError(
                f"{type(block).__name__}: the inputs of block {index} are not the outputs of the "
                "block before, which its backward will take them for; expected hooks that leave "
                "streams alone: put what changes them in a Reversible of its own"
            )

    def take(self, index: int, block: nn.Module) -> list[Tensor]:
        outputs = self.outputs.pop(index, None)
        if outputs is None:
            raise RuntimeError(
                f"{type(block).__name__}: cannot restore the inputs of block {index}, because the "
                "backward did not come through the blocks after it; expected a loss that depends "
                "on the chain's last outputs (add 0 * output.sum() to it), or reversible=False"
            )
        return outputs


class _Call(NamedTuple):
    """One block in one forward call; `before` computes its inputs again if they are not kept."""

    block: Reversible
    replay: Replay
    tape: Tape
    index: int
    inputs: int
    parameters: list[Tensor]
    before: "_Call | None" = None

    def saved(self, xs: Streams, ys: Streams) -> Streams:
        """The streams to save: none if the block after this one will restore the outputs."""
        if self.block.keeps_inputs:
            return xs
        return ys if self.index == self.tape.blocks - 1 else ()

    def inputs_again(self, xs: list[Tensor]) -> list[Tensor]:
        """What `xs` are the inputs of `before` for."""
        if self.before is None:
            return xs
        replay = self.before.replay
        xs = self.before.inputs_again(xs)
        with replay.held.restored(), replay.second(), torch.no_grad():
            return list(compute_of(self.before.block)(self.before.block, *xs))


class _Block(torch.autograd.Function):
    """One block in the graph. Parameters are inputs, so that autograd sees where they are used."""

    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor):
        xs = tensors[: call.inputs]
        call.tape.check_unchanged(call.index, call.block, xs)
        versions = [x._version for x in xs]
        with call.replay.first(xs[0]):
            ys = tuple_of_streams(call.block, compute_of(call.block)(call.block, *xs), "forward")
        if [x._version for x in xs] != versions:
            raise RuntimeError(
                f"{type(call.block).__name__}: forward changed an input in place; expected "
                "b = b + f(a), not b += f(a)"
            )
        if call.tape.check:
            check_range(call.block, ys)
            if not call.block.keeps_inputs:
                check_inverse(call.block, call.replay, xs, ys)
        call.tape.last = [identity(y) for y in ys]
        buffers = call.replay.held.buffers_read(call.replay.moved())
        ctx.call = call
        ctx.channels_last = [y.dim() == 4 and Geometry.of(y).channels_last for y in ys]
        if call.before is None:
            streams = call.saved(xs, ys)
        else:
            streams = call.tape.before[1]
        call.tape.before = (call, streams) if call.block.keeps_inputs else None
        ctx.saved_streams = len(streams)
        # Parameters and buffers are saved so that autograd notices a change before the backward.
        ctx.save_for_backward(*streams, *call.replay.held.unique_parameters, *buffers)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx, *grad_ys: Tensor | None):
        call = ctx.call
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(call.block).__name__}: a gradient of gradients (create_graph=True) needs "
                "stored activations; set reversible=False"
            )
        saved = [y.detach() for y in ctx.saved_tensors[: ctx.saved_streams]]
        ys = call.inputs_again(saved) if saved else call.tape.take(call.index, call.block)
        del saved
        step = Step(call.replay, ctx.needs_input_grad[1 : 1 + call.inputs])
        call.replay.stand_ins = call.replay.held.stand_ins()
        with call.replay.held.restored() as stand_ins:
            xs, grad_xs = call.block.backward_step(
                ys,
                [
                    readable(grad, last)
                    for grad, last in zip(grad_ys, ctx.channels_last, strict=True)
                ],
                step,
            )
        if call.index > call.tape.first and call.before is None:
            call.tape.outputs[call.index - 1] = list(xs)
        stand_ins |= call.replay.stand_ins
        used = [stand_ins.get(id(p), p) for p in call.parameters]
        return None, *grad_xs, *(step.parameter_grads.get(id(p)) for p in used)


class _Place(NamedTuple):
    """Where in a chain a block is called. Without a tape it runs as plain modules do."""

    tape: Tape | None
    index: int


def _run_by_engine(compute: Callable) -> Callable:
    """`forward` for callers, around the author's: module hooks (FSDP, users) stay outside."""

    @functools.wraps(compute)
    def forward(self, *xs, place: _Place | None = None):
        if type(self).forward is not forward:  # called by a subclass through super()
            return compute(self, *xs)
        if place is None:
            xs = enter(self, xs, self.lattice)
            tape = Tape(1, self.check) if self.reversible and _wants_graph(self) else None
            place = _Place(tape, 0)
            if tape is not None and torch.compiler.is_compiling():
                return _untraced_block(self, compute, place, xs)
        return _call_block(self, compute, place, xs)

    forward.compute = compute
    return forward


def _call_block(block: Reversible, compute: Callable, place: _Place, xs: Streams) -> Streams:
    if torch.compiler.is_compiling():
        return _call_alone(block, compute, place, xs)
    with sharing(block):
        return _call_alone(block, compute, place, xs)


def _call_alone(block: Reversible, compute: Callable, place: _Place, xs: Streams) -> Streams:
    if place.tape is None:
        return compute(block, *xs)
    replay = Replay(block, place.tape.check)
    parameters = [p for p in replay.held.unique_parameters if p.requires_grad]
    if not parameters and not any(x.requires_grad for x in xs):
        place.tape.before = None
        with torch.no_grad():
            return compute(block, *xs)
    if place.tape.first is None:
        place.tape.first = place.index
    before = place.tape.before[0] if block.reruns_before and place.tape.before else None
    call = _Call(block, replay, *place, len(xs), parameters, before)
    return _Block.apply(call, *xs, *parameters)


def compute_of(block: Reversible) -> Callable:
    """The author's `forward`, past the engine."""
    return type(block).forward.compute


def _wants_graph(chain: nn.Module) -> bool:
    """Whether blocks keep a graph of their own: not inside a transform, which is recomputed."""
    is_replica = getattr(chain, "_is_replica", False)  # DataParallel's hide their parameters
    is_recorded = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not (is_replica or is_recorded or is_replaying())


def _run_with_tape(chain: "ReversibleSequential", xs: Streams) -> Streams:
    tape = Tape(len(chain), chain.check)
    for index, block in enumerate(chain):
        xs = block(*xs, place=_Place(tape, index))
    tape.before = None  # its calls refer to the tape
    return xs


# The compiler cannot look through the engine. Not torch.compiler.disable, which imports it.
_untraced = torch._disable_dynamo(_run_with_tape)
_untraced_block = torch._disable_dynamo(_call_block)
Reversible.forward = _run_by_engine(Reversible.forward)


class ReversibleSequential(nn.Sequential):
    """A chain of `Reversible` blocks that holds no more for the backward than its last streams.

    `forward(*xs)` returns the tuple of streams of the last block; `inverse(*ys)` takes it back. A
    block may stand in it twice, and a hook on a block may read its outputs for another loss, as
    long as the loss depends on the chain's last outputs too.

    Args:
        blocks: Called in turn, each with the streams that the one before returned.
        reversible: False trains under plain autograd; may be switched at any time.
        lattice: Exact mode: a power of two, such as 2**-12, set on every block. The inputs are
            rounded to it, and so is what blocks add; float32 streams below 2²⁴·lattice are then
            restored bit for bit. None leaves the blocks' own.
        check: True looks for faults in every forward, as `Reversible.check` does.

    Raises:
        TypeError, ValueError: A block is not a `Reversible`; the lattice is not a power of two.
    """

    def __init__(
        self,
        *blocks: Reversible,
        reversible: bool = True,
        lattice: float | None = None,
        check: bool = False,
    ) -> None:
        super().__init__(*blocks)
        self.reversible, self.check = reversible, check
        self._check_blocks()
        if lattice is not None:
            self.lattice = lattice

    __prepare_scriptable__ = Reversible.__prepare_scriptable__

    @property
    def lattice(self) -> float | None:
        """The finest lattice of the blocks; setting it sets that of every block."""
        return finest_lattice(self)

    @lattice.setter
    def lattice(self, lattice: float | None) -> None:
        check_lattice("ReversibleSequential", lattice, torch.float32)
        for block in self:
            block.lattice = lattice

    def forward(self, *xs: Tensor) -> Streams:
        self._check_blocks()
        xs = enter(self, xs, self.lattice)
        if self.reversible and _wants_graph(self):
            run_with_tape = _untraced if torch.compiler.is_compiling() else _run_with_tape
            return run_with_tape(self, xs)
        for block in self:
            xs = block(*xs, place=_Place(None, 0))
        return xs

    def inverse(self, *ys: Tensor) -> Streams:
        """Return the streams that `forward` was given, on the lattice if there is one.

        Batch norms in training mode normalise by the restored batch and move their statistics.
        """
        self._check_blocks()
        if any(isinstance(y, (tuple, list)) for y in ys):
            raise TypeError(
                "ReversibleSequential: inverse takes streams one by one, as in inverse(*streams), "
                "got a tuple"
            )
        for block in reversed(list(self)):
            ys = block.inverse(*ys)
        return ys

    def _check_blocks(self) -> None:
        for k, block in enumerate(self):
            if not isinstance(block, Reversible):
                hint = "; unpack it: *chain" if isinstance(block, ReversibleSequential) else ""
                raise TypeError(
                    f"ReversibleSequential: block {k} must be a Reversible (forward and inverse), "
                    f"got {type(block).__name__}{hint}"
                )
        lattices = [block.lattice for block in self]
        if None in lattices and any(lattices):
            raise ValueError(
                f"ReversibleSequential: block {lattices.index(None)} has no lattice and others "
                "have; set the chain's lattice, for all of them"
            )
