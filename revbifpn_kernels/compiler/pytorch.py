"""What this folder uses of PyTorch without a promise of compatibility, in one place.

Looked up when a network is compiled, not before; what is missing raises an error that names it.
Tested with torch 2.12 and 2.14.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch


def annotate(tags: dict[str, str]) -> contextlib.AbstractContextManager:
    """Gives the nodes traced inside these entries in `node.meta["custom"]`."""
    return torch.fx.traceback.annotate(tags)


def private(module: str, name: str) -> Any:
    """Return `module.name`, or raise an error that says what this PyTorch lacks."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"compile: expected {module}.{name} as in torch 2.12 to 2.14, and "
            f"torch {torch.__version__} lacks it; set reversible=False, or compile the transforms"
        ) from error


def backend_of_trace() -> Any:
    """The backend that Dynamo traces for: a function, or an object with `config` (inductor)."""
    translator = private("torch._dynamo.symbolic_convert", "InstructionTranslator")
    backend = translator.current_tx().output.compiler_fn
    # In a call of DistributedDataParallel it is a method of what cuts graphs into buckets.
    backend = getattr(getattr(backend, "__self__", None), "backend_compile_fn", backend)
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        backend = getattr(backend, name, backend)
    return backend


def called_by_dynamo(function: Callable) -> Callable:
    """Has Dynamo call a function while it traces, and take the result as a constant.

    `torch.compiler.assume_constant_result` would import Dynamo with the package.
    """
    function._dynamo_marked_constant = True
    return function


_in_graph: list[Callable] = []


def in_graph(function: Callable) -> Callable:
    """Has Dynamo put calls of a function into its graph, where AOTAutograd traces it.

    From `prepare_dynamo` on, which imports Dynamo.
    """
    _in_graph.append(function)
    return function


def prepare_dynamo() -> None:
    """Tell Dynamo of the functions that are `in_graph`.

    Raises:
        RuntimeError: This PyTorch loses the tags of `annotate`, so that activations were stored.
    """
    if torch.__version__ < (2, 12):
        raise RuntimeError(f"compile: expected torch 2.12 or later, got {torch.__version__}")
    torch.compiler.allow_in_graph(_in_graph)
