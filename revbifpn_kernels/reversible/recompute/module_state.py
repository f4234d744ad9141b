"""The modes, parameters and buffers of a block's modules at the time of its forward.

The recompute must see the same. Usually the modules still have them, and nothing is touched; under
`torch.func.functional_call` or after `eval()` the modules are given back what they had for as long
as the recompute takes. Other threads must not run them meanwhile.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

_swapping = threading.RLock()


class Slot(NamedTuple):
    """An entry of a module's `_parameters` or `_buffers`."""

    entries: dict[str, Tensor | None]
    name: str
    tensor: Tensor

    def is_current(self) -> bool:
        return self.name in self.entries and self.entries[self.name] is self.tensor


class ModuleState:
    """Modes, parameters and buffers of all modules in a block."""

    def __init__(self, block: nn.Module) -> None:
        self.modes: list[tuple[nn.Module, bool]] = []
        self.parameters: list[Slot] = []
        self.buffers: list[tuple[Slot, int]] = []  # with their versions
        self.has_opaque = False
        self.counters: set[int] = set()  # ids of norms' `num_batches_tracked`
        parts = parts_of(block)
        _check_sharding(block, parts)
        for module in parts:
            self.modes.append((module, module.training))
            self.has_opaque |= is_opaque(module)
            if isinstance(module, _NormBase):
                self.counters.add(id(module.num_batches_tracked))
            for name, parameter in module._parameters.items():
                if is_lazy(parameter):
                    raise RuntimeError(
                        f"{type(block).__name__}: a lazy module has no parameters yet; expected "
                        "one forward under torch.no_grad() before the first step"
                    )
                if parameter is not None:
                    self.parameters.append(Slot(module._parameters, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self.buffers.append((Slot(module._buffers, name, buffer), buffer._version))

    @functools.cached_property
    def unique_parameters(self) -> list[Tensor]:
        return list({id(slot.tensor): slot.tensor for slot in self.parameters}.values())

    def buffers_read(self, updated: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers that the forward may have read; `updated` ones change in every step.

        Raises:
            RuntimeError: The forward changed another buffer, so that the recompute would differ.
        """
        moved_ids = {id(buffer) for buffer in updated}
        read = [pair for pair in self.buffers if id(pair[0].tensor) not in moved_ids]
        for slot, version in read:
            if slot.tensor._version != version:
                raise RuntimeError(
                    f"the buffer {slot.name!r} of shape {tuple(slot.tensor.shape)} changed in the "
                    "forward, so the recompute in the backward would differ: expected transforms "
                    "to change running statistics of PyTorch's norms at most; put the module that "
                    "owns it in eval mode, or set reversible=False"
                )
        return [slot.tensor for slot, _ in read]

    def stand_ins(self) -> dict[int, Tensor]:
        """Aliases of the parameters with hooks, by id: hooks must not see the inner gradient."""
        return _aliases(p for p in self.unique_parameters if p._backward_hooks)

    @contextlib.contextmanager
    def restored(self) -> Iterator[dict[int, Tensor]]:
        """Give the modules this state again; yields what replaces each parameter, by its id."""
        if self._is_current():
            yield {}
            return
        stand_ins = _aliases(self.unique_parameters)
        slots = [Slot(e, n, stand_ins[id(p)]) for e, n, p in self.parameters]
        slots += [slot for slot, _ in self.buffers]
        with _swapping:
            modes = [(module, module.training) for module, _ in self.modes]
            present = [Slot(entries, name, entries[name]) for entries, name, _ in slots]
            try:
                _set(self.modes, slots)
                yield stand_ins
            finally:
                _set(modes, present)

    def _is_current(self) -> bool:
        """Whether modules are as they were; opaque ones must not see parameters with hooks."""
        if self.has_opaque and any(slot.tensor._backward_hooks for slot in self.parameters):
            return False
        return (
            all(module.training == training for module, training in self.modes)
            and all(slot.is_current() for slot in self.parameters)
            and all(slot.is_current() for slot, _ in self.buffers)
        )


def _set(modes: Iterable[tuple[nn.Module, bool]], slots: Iterable[Slot]) -> None:
    for module, training in modes:
        module.training = training
    for entries, name, tensor in slots:
        entries[name] = tensor


def _aliases(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """Leaves that share the parameters' memory, by the parameters' ids."""
    return {id(p): p.detach().requires_grad_(p.requires_grad) for p in parameters}


def _check_sharding(block: nn.Module, parts: Iterable[nn.Module]) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second
    if fsdp is None:
        return
    for part in parts:
        if part is not block and isinstance(part, fsdp.FSDPModule):
            raise RuntimeError(
                f"{type(block).__name__}: {type(part).__name__} is sharded by itself within the "
                "block, whose recompute FSDP does not see; expected fully_shard(block)"
            )


def parts_of(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())`, several times as fast."""
    parts = {module: None}
    pending = [module]
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and child not in parts:
                parts[child] = None
                pending.append(child)
    return list(parts)


def parameters_of(module: nn.Module) -> list[Tensor]:
    """`list(module.parameters())`, several times as fast."""
    every = (p for part in parts_of(module) for p in part._parameters.values() if p is not None)
    return list({id(p): p for p in every}.values())


def is_opaque(module: nn.Module) -> bool:
    """Whether calls inside `module` cannot be seen: it is compiled, scripted or replaced."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes a second
    return (
        isinstance(module, torch.jit.ScriptModule)
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or (compiler is not None and isinstance(module, compiler.OptimizedModule))
    )


def running_statistics(parts: Sequence[nn.Module]) -> list[Tensor]:
    """The buffers that norms in training mode update whenever one of these modules runs."""
    return [
        buffer
        for norm in parts
        if isinstance(norm, _NormBase) and norm.training
        for buffer in norm._buffers.values()
        if buffer is not None
    ]
