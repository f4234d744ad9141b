"""How a reversible chain is traced by torch.compile."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .tags import in_block, in_transform


def trace_blocks(blocks: Sequence[nn.Module], xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Call the blocks in turn, so that the compiled backward restores what they compute."""
    labels = [f"block {k}, {type(block).__name__}" for k, block in enumerate(blocks)]
    torch.ops.revbifpn.reversible_chain("; ".join(labels))
    for k, block in enumerate(blocks):
        with in_block(labels[k]):
            if block.keeps_inputs:  # all that it does is computed again
                with in_transform("all"):
                    xs = block(*xs, slot=(None, k))
            else:
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


def _constant(function):
    """Has Dynamo call a function while it traces, and take the result as a constant."""
    function._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does
    return function


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=2)


@_constant
def _refuse(block: str, reason: str) -> bool:
    _say_once(
        f"torch.compile leaves a reversible chain uncompiled, because a {block} of it {reason}; it "
        "runs as it does without the compiler, with a graph break"
    )
    return False


@_constant
def restores_maps() -> bool:
    """Whether Dynamo traces for a backend of `compile`, which restores maps."""
    from . import partition, pytorch

    backend = pytorch.backend_of_trace()
    if pytorch.is_inductor(backend):
        return partition.restores_maps(backend.config.get("custom_partitioner_fn"))
    return getattr(backend, "restores_maps", False)
