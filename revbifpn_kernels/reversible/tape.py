"""One forward call of a chain: hands restored streams from one block's backward to the next."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .recompute import BlockTrace
from .recompute.checks import check_inverse, check_range, tuple_of_streams
from .streams import Streams, identity


class Tape:
    """What the blocks of one forward call share."""

    def __init__(self, blocks: int, check: bool) -> None:
        self.blocks = blocks
        self.check = check
        self.first: int | None = None  # the first block that has a graph
        self.outputs: dict[int, list[Tensor]] = {}  # restored, until the block takes them
        # In the forward: the call of the preceding block and the inputs that it saves, if it does.
        self.previous: tuple[BlockCall, Streams] | None = None
        self.returned_identities: list[tuple] | None = None  # of the preceding block's outputs

    def check_inputs(self, index: int, block: nn.Module, xs: Streams) -> None:
        """Raise unless `xs` are what the block before returned: that is what gets restored."""
        expected = self.returned_identities
        if expected is not None and expected != [identity(x) for x in xs]:
            raise RuntimeError(
                f"{type(block).__name__}: the inputs of block {index} are not the outputs of the "
                "block before, and the backward would treat them as those outputs; expected hooks "
                "that leave streams alone: put what changes them in a Reversible of its own"
            )

    def take(self, index: int, block: nn.Module) -> list[Tensor]:
        """Return the restored outputs of a block, and forget them."""
        outputs = self.outputs.pop(index, None)
        if outputs is None:
            raise RuntimeError(
                f"{type(block).__name__}: cannot restore the inputs of block {index}, because the "
                "backward did not come through the blocks after it; expected a loss that depends "
                "on the chain's last outputs (add 0 * output.sum() to it), or reversible=False"
            )
        return outputs


def compute_of(block: nn.Module) -> Callable:
    """The author's `forward`, without the engine around it."""
    return type(block).forward.compute


class BlockCall(NamedTuple):
    """One block in one forward call."""

    block: nn.Module
    trace: BlockTrace
    tape: Tape
    index: int
    input_count: int
    parameters: list[Tensor]
    previous: "BlockCall | None"  # the block before, if the backward reruns it

    def run(self, xs: Sequence[Tensor]) -> Streams:
        return tuple_of_streams(self.block, compute_of(self.block)(self.block, *xs), "forward")

    def streams_to_save(self, xs: Streams, ys: Streams) -> Streams:
        """The streams to save; none if the block after this one will restore the outputs."""
        if self.previous is not None:
            return self.tape.previous[1]
        if self.block.keeps_inputs:
            return xs
        return ys if self.index == self.tape.blocks - 1 else ()

    def streams_from(self, saved: list[Tensor]) -> list[Tensor]:
        """What `backward_step` takes: `saved`, or what the previous block computes from it."""
        if self.previous is None:
            return saved
        trace = self.previous.trace
        xs = self.previous.streams_from(saved)
        with trace.state.restored(), trace.recomputing(), torch.no_grad():
            return list(self.previous.run(xs))

    def check(self, xs: Streams, ys: Streams) -> None:
        """Raise if the streams leave the lattice's range, or `inverse` does not return `xs`."""
        check_range(self.block, ys)
        if not self.block.keeps_inputs:
            with self.trace.recomputing(is_reversed=True):
                restored = tuple_of_streams(self.block, self.block.inverse(*ys), "inverse")
            check_inverse(self.block, xs, ys, restored)
