"""Tags on the nodes of a traced graph: which block of a reversible chain made them.

PyTorch keeps them from Dynamo to the joint graph of AOTAutograd, and gives the nodes of a backward
the tags of their forward.
"""

import contextlib
from collections.abc import Iterator

from torch import fx

from ..ops.library import library
from .pytorch import annotate

_BLOCK, _TRANSFORM = "revbifpn block", "revbifpn transform"

# Has no effect. It puts the chain into the code of a graph, which the tags are not in: the
# compiler's caches look for graphs by their code.
library.define("reversible_chain(str blocks) -> ()")
library.impl("reversible_chain", lambda blocks: None, "CompositeExplicitAutograd")

_open: list[str] = []  # the labels of the blocks that are traced


@contextlib.contextmanager
def in_block(label: str) -> Iterator[None]:
    """Tags what is traced inside as a block's; in a transform it stays part of that as well."""
    _open.append(label)
    try:
        with annotate({_BLOCK: label}):
            yield
    finally:
        _open.pop()


def in_transform(name: str) -> contextlib.AbstractContextManager:
    """Tags what is traced inside as a transform's, in a block."""
    return annotate({_TRANSFORM: name}) if _open else contextlib.nullcontext()


def block_of(node: fx.Node) -> str | None:
    """The label of the block that made a node; None outside of reversible chains."""
    return (node.meta.get("custom") or {}).get(_BLOCK)


def is_in_transform(node: fx.Node) -> bool:
    return _TRANSFORM in (node.meta.get("custom") or {})
