"""How a reversible chain is traced by torch.compile."""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .pytorch import backend_of_trace, called_by_dynamo
from .tags import in_block, in_transform


def trace_blocks(blocks: Sequence[nn.Module], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the blocks in turn, so that the compiled backward restores what they compute."""
    labels = [f"block {k}, {type(block).__name__}" for k, block in enumerate(blocks)]
    torch.ops.revbifpn.reversible_chain("; ".join(labels))
    for k, block in enumerate(blocks):
        with in_block(labels[k]):
            # Without an inverse, all that it does is computed again.
            with in_transform("all") if block.keeps_inputs else contextlib.nullcontext():
                xs = block(*xs, slot=(None, k))
    return xs


def can_trace(blocks: Sequence[nn.Module]) -> bool:
    """Whether a compiled backward can restore what these blocks compute; says once why not."""
    if not restores_maps():
        return False
    for block in blocks:
        name = type(block).__name__
        if block.check:
            return _refuse(name, "checks itself (check=True)")
        if block.lattice is not None:
            return _refuse(name, "is in exact mode")
        if not (block.is_additive or block.keeps_inputs):
            return _refuse(name, "has a forward or backward_step of its own")
    return True


_refused: set[tuple[str, str]] = set()


@called_by_dynamo
def _refuse(block: str, reason: str) -> bool:
    if (block, reason) not in _refused:
        _refused.add((block, reason))
        warnings.warn(
            f"torch.compile leaves a reversible chain uncompiled, because a {block} of it "
            f"{reason}; it runs as it does without the compiler, with a graph break",
            stacklevel=2,
        )
    return False


@called_by_dynamo
def restores_maps() -> bool:
    """Whether Dynamo traces for a backend of `compile`, which restores maps."""
    backend = backend_of_trace()
    config = getattr(backend, "config", None)  # inductor's
    partitioner = config.get("custom_partitioner_fn") if isinstance(config, dict) else None
    return any(getattr(part, "restores_maps", False) for part in (backend, partitioner))
