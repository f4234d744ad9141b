"""`compile`: torch.compile that keeps the memory of a training step reversible."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .pytorch import prepare_dynamo, private


def compile(
    model: nn.Module,
    *,
    fullgraph: bool = True,
    backend: str = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool = False,
) -> Any:
    """`torch.compile(model, …)` of a whole training step that stores no activations.

    A compiled chain holds what it holds without the compiler: its last streams, and what is small
    or random. Plain `torch.compile` leaves chains uncompiled instead.

    Args:
        model: A network or a chain, in training or evaluation; both are compiled when called.
        fullgraph: Whether a part that cannot be compiled is an error. With False it runs as it does
            without the compiler: blocks with an inverse of their own, exact mode, `check=True`.
        backend: "inductor", which generates code, or "aot_eager", which only traces and rewrites
            the step and needs no compiler. Others would store activations.
        mode, options: As in `torch.compile`, for inductor; both may be given.
        dynamic: Must be False: each shape is a graph of its own.

    Returns:
        What `torch.compile` returns: a module that shares the model's parameters.

    Raises:
        ValueError: Another backend, or `dynamic` is not False.
        RuntimeError: When called, if a stream has no inverse, or this PyTorch lacks what the
            rewrite needs; the message names it.
    """
    if dynamic is not False:
        raise ValueError(f"compile: dynamic must be False, got {dynamic!r}")
    if backend == "aot_eager":
        return torch.compile(model, fullgraph=fullgraph, backend=aot_eager(), dynamic=False)
    if backend != "inductor":
        raise ValueError(f"compile: backend must be 'inductor' or 'aot_eager', got {backend!r}")
    from .partition import ReversiblePartitioner

    prepare_dynamo()
    config = private("torch._inductor", "config")
    of_mode = private("torch._inductor", "list_mode_options")(mode or "default")
    options = {**of_mode, **(options or {})}
    theirs = options.get("custom_partitioner_fn", config.custom_partitioner_fn)
    options["custom_partitioner_fn"] = ReversiblePartitioner(theirs)
    return torch.compile(model, fullgraph=fullgraph, options=options, dynamic=False)


def aot_eager(inner: Any = None) -> Callable:
    """A backend that runs the rewritten graphs as they are; `inner` as in ReversiblePartitioner."""
    from .partition import ReversiblePartitioner

    prepare_dynamo()
    boxed = private("functorch.compile", "make_boxed_func")
    backend = private("torch._dynamo.backends.common", "aot_autograd")(
        fw_compiler=lambda gm, _: boxed(gm.forward),
        partition_fn=ReversiblePartitioner(inner),
        decompositions=private("torch._inductor.decomposition", "select_decomp_table")(),
    )
    backend.restores_maps = True
    return backend
