"""One forward call of a chain: hands restored streams from one block's backward to the next."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from .streams import Streams, identity

if TYPE_CHECKING:
    from .function import BlockCall


class Tape:
    """What the blocks of one forward call share.

    Attributes:
        first: Index of the first block that has a graph.
        outputs: Restored streams by the index of the block that returned them, until it takes them.
        previous: In the forward the call of the block before and the inputs that were saved for it,
            if that block keeps its inputs.
    """

    def __init__(self, blocks: int, check: bool) -> None:
        self.blocks = blocks
        self.check = check
        self.first: int | None = None
        self.outputs: dict[int, list[Tensor]] = {}
        self.previous: tuple[BlockCall, Streams] | None = None
        self._returned: list[tuple] | None = None

    def check_inputs(self, index: int, block: nn.Module, xs: Streams) -> None:
        """Raise unless `xs` are what the block before returned, as which it will be restored."""
        if self._returned is not None and self._returned != [identity(x) for x in xs]:
            raise RuntimeError(
                f"{type(block).__name__}: the inputs of block {index} are not the outputs of the "
                "block before, which its backward will take them for; expected hooks that leave "
                "streams alone: put what changes them in a Reversible of its own"
            )

    def note_outputs(self, ys: Streams) -> None:
        self._returned = [identity(y) for y in ys]

    def take(self, index: int, block: nn.Module) -> list[Tensor]:
        """Return the restored outputs of a block, which nobody else needs."""
        outputs = self.outputs.pop(index, None)
        if outputs is None:
            raise RuntimeError(
                f"{type(block).__name__}: cannot restore the inputs of block {index}, because the "
                "backward did not come through the blocks after it; expected a loss that depends "
                "on the chain's last outputs (add 0 * output.sum() to it), or reversible=False"
            )
        return outputs


class Place(NamedTuple):
    """Where in a chain a block is called. Without a tape it runs as plain modules do."""

    tape: Tape | None
    index: int
