"""The chain of reversible blocks."""

import torch
from torch import Tensor, nn

from ..compiler.trace import can_trace, trace_blocks
from ..ops.checks import check_lattice
from .block import Reversible
from .function import wants_graph
from .streams import Streams, enter, finest_lattice
from .tape import Tape


class ReversibleSequential(nn.Sequential):
    """A chain of `Reversible` blocks that saves no more for the backward than its last streams.

    `forward(*xs)` returns the tuple of streams of the last block; `inverse(*ys)` the inputs. A
    block may be in it twice, and a hook on a block may read its outputs for another loss, as long
    as the loss depends on the chain's last outputs too.

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
        if not (self.reversible and wants_graph(self)):
            return _run(self, xs, None)
        if not torch.compiler.is_compiling():
            return _run(self, xs, Tape(len(self), self.check))
        if can_trace(list(self)):
            return trace_blocks(list(self), xs)
        return _run_untraced(self, xs, Tape(len(self), self.check))

    def inverse(self, *ys: Tensor) -> Streams:
        """Return the streams that `forward` was given, on the lattice if there is one.

        Batch norms in training mode normalise by the restored batch and update their statistics.
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


def _run(chain: ReversibleSequential, xs: Streams, tape: Tape | None) -> Streams:
    for index, block in enumerate(chain):
        xs = block(*xs, slot=(tape, index))
    if tape is not None:
        tape.previous = None  # its calls refer to the tape
    return xs


# Hides the engine from the compiler. torch.compiler.disable would import it here and now.
_run_untraced = torch._disable_dynamo(_run)
