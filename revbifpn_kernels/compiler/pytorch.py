"""What this folder uses of PyTorch without a promise of compatibility, in one place.

Looked up when a network is compiled, not before; what is missing raises an error that names it.
Tested with torch 2.12.
"""

import contextlib
import importlib
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
            f"compile: expected {module}.{name} as in torch 2.11 to 2.14, and "
            f"torch {torch.__version__} lacks it; set reversible=False, or compile the transforms"
        ) from error


def backend_of_trace() -> Any:
    """The backend that Dynamo traces for: a function, or an object with `config` (inductor)."""
    translator = private("torch._dynamo.symbolic_convert", "InstructionTranslator")
    backend = translator.current_tx().output.compiler_fn
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        backend = getattr(backend, name, backend)
    return backend


def is_inductor(backend: Any) -> bool:
    return isinstance(backend, private("torch", "_TorchCompileInductorWrapper"))


def partition_by_min_cut(gm: torch.fx.GraphModule, inputs: Any, *, cse: bool, **options: Any):
    """PyTorch's own split of a joint graph into forward and backward."""
    partition = private("torch._functorch.partitioners", "min_cut_rematerialization_partition")
    with torch._functorch.config.patch(cse=cse):
        return partition(gm, inputs, **options)
