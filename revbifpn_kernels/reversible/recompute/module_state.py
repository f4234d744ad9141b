"""The modes, parameters and buffers of a block's modules at the time of its forward.

The recompute must see the same ones. Usually the modules still have them, and nothing is done.
After `torch.func.functional_call` or `eval()` they have others: then the modules get the forward's
back while the recompute runs. Other threads must not run them meanwhile.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import is_, methodcaller

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedTensorMixin

from .snapshot import Snapshot, parts_of, snapshot_of

_swapping = threading.RLock()
# Layers of torch.nn that neither draw random numbers nor normalise by batch statistics.
_SILENT_LAYERS = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.GroupNorm, nn.LayerNorm, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Upsample, nn.PixelShuffle),
    nn.ZeroPad2d,
}


# Not dict.keys and dict.values, because the dictionaries of scripted modules are of another type.
_keys, _values = methodcaller("keys"), methodcaller("values")
# An entry of a module's `_parameters` or `_buffers`: the dictionary, a name in it, the tensor.
Slot = tuple[dict[str, Tensor | None], str, Tensor]


class Slots:
    """The entries of many modules' `_parameters` or `_buffers`, in flat lists."""

    def __init__(self, owners: Sequence[dict[str, Tensor | None]]) -> None:
        self._owners = owners
        self._counts = [*map(len, owners)]
        self._names = [*chain.from_iterable(map(_keys, owners))]
        self.tensors = [*chain.from_iterable(map(_values, owners))]  # or None, as for no bias

    def are_current(self) -> bool:
        """Whether the modules still have these tensors under these names."""
        tensors = [*chain.from_iterable(map(_values, self._owners))]
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and [*chain.from_iterable(map(_keys, self._owners))] == self._names
        )

    def __iter__(self) -> Iterator[Slot]:
        owners = chain.from_iterable(map(repeat, self._owners, self._counts))
        slots = zip(owners, self._names, self.tensors, strict=True)
        return (slot for slot in slots if slot[2] is not None)


class Transform:
    """The modules of a transform, and what the engine derives from their types."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = parts_of(module)
        self.records_itself = all(map(records_itself, self.parts))
        self.synchronised = [p for p in self.parts if isinstance(p, nn.SyncBatchNorm)]

    @functools.cached_property
    def hooks(self) -> list[dict]:
        return [hooks for p in self.parts for hooks in (p._forward_hooks, p._forward_pre_hooks)]


class BlockSnapshot(Snapshot):
    """A snapshot of a block's modules, and what the engine derives from them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        _check_sharding(block, self.parts)
        every = block, *self.parts
        self.parameters = [part._parameters for part in every]
        self.buffers = [part._buffers for part in every]
        self.has_opaque = any(map(is_opaque, self.parts))
        self.norms = [part for part in self.parts if isinstance(part, _NormBase)]
        self._known = set(self.parts)
        self._transforms: dict[nn.Module, Transform] = {}

    def transform(self, module: nn.Module) -> Transform:
        """The `Transform` of a module that the block calls, made once."""
        found = self._transforms.get(module)
        if found is None:
            found = Transform(module)
            if module in self._known:  # the snapshot does not see changes of other modules
                self._transforms[module] = found
        return found


class ModuleState:
    """Modes, parameters and buffers of all modules in a block, at the time when this is made."""

    def __init__(self, block: nn.Module) -> None:
        snapshot = self.snapshot = snapshot_of(block, BlockSnapshot)
        self.has_opaque = snapshot.has_opaque or is_opaque(block)
        self.modules = block, *snapshot.parts
        self.modes = [module.training for module in self.modules]
        self.parameters, self.buffers = Slots(snapshot.parameters), Slots(snapshot.buffers)
        self.versions = [None if b is None else b._version for b in self.buffers.tensors]
        self.unique_parameters = unique(self.parameters.tensors)
        kinds = set(map(type, self.unique_parameters))
        if any([issubclass(kind, UninitializedTensorMixin) for kind in kinds]):
            raise RuntimeError(
                f"{type(block).__name__}: a lazy module has no parameters yet; expected "
                "one forward under torch.no_grad() before the first step"
            )

    @functools.cached_property
    def counters(self) -> set[int]:
        """The ids of norms' `num_batches_tracked`."""
        return {id(norm._buffers.get("num_batches_tracked")) for norm in self.snapshot.norms}

    def buffers_read(self, updated: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers that the forward may have read, without those that it `updated`.

        Raises:
            RuntimeError: The forward changed another buffer, so that the recompute would differ.
        """
        updated_ids = {id(buffer) for buffer in updated}
        read = []
        for buffer, version in zip(self.buffers.tensors, self.versions, strict=True):
            if buffer is None or id(buffer) in updated_ids:
                continue
            if buffer._version != version:
                name = next(name for _, name, other in self.buffers if other is buffer)
                raise RuntimeError(
                    f"the buffer {name!r} of shape {tuple(buffer.shape)} changed in the "
                    "forward, so the recompute in the backward would differ: expected transforms "
                    "to change running statistics of PyTorch's norms at most; put the module that "
                    "owns it in eval mode, or set reversible=False"
                )
            read.append(buffer)
        return read

    def stand_ins(self) -> dict[int, Tensor]:
        """Aliases of the parameters that have hooks, by the parameters' ids.

        The recompute uses them instead, so that the hooks do not see the gradients inside it.
        """
        return _aliases(p for p in self.unique_parameters if p._backward_hooks)

    @contextlib.contextmanager
    def restored(self) -> Iterator[dict[int, Tensor]]:
        """Give the modules this state while the `with` runs.

        Yields the tensor that replaces each parameter, by its id; empty if nothing had changed.

        Raises:
            RuntimeError: A module has been replaced since the forward.
        """
        if not self.snapshot.has_same_modules():
            raise RuntimeError(
                f"{type(self.modules[0]).__name__}: a module inside the block was replaced after "
                "the forward, so the recompute in the backward would differ; expected the modules "
                "of the forward until the backward has run"
            )
        if self._is_current():
            yield {}
            return
        stand_ins = _aliases(self.unique_parameters)
        slots = [(e, n, stand_ins[id(p)]) for e, n, p in self.parameters] + list(self.buffers)
        with _swapping:
            modes = [module.training for module in self.modules]
            present = [(entries, name, entries[name]) for entries, name, _ in slots]
            try:
                self._set(self.modes, slots)
                yield stand_ins
            finally:
                self._set(modes, present)

    def _set(self, modes: Iterable[bool], slots: Iterable[Slot]) -> None:
        for module, training in zip(self.modules, modes, strict=True):
            module.training = training
        for entries, name, tensor in slots:
            entries[name] = tensor

    def _is_current(self) -> bool:
        """Whether the modules have this state, so that the recompute can use them as they are."""
        # Stand-ins for parameters with hooks do not reach calls inside opaque modules.
        if self.has_opaque and any(p._backward_hooks for p in self.unique_parameters):
            return False
        modes = [module.training for module in self.modules]
        return modes == self.modes and self.parameters.are_current() and self.buffers.are_current()


def _aliases(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """New leaf tensors that share the parameters' memory, by the parameters' ids."""
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


def parameters_of(module: nn.Module) -> list[Tensor]:
    """`list(module.parameters())`, several times as fast."""
    return unique(p for part in parts_of(module) for p in part._parameters.values())


def unique(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def is_opaque(module: nn.Module) -> bool:
    """Whether calls inside `module` cannot be seen: it is compiled, scripted or replaced."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes a second
    return (
        isinstance(module, torch.jit.ScriptModule)
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or (compiler is not None and isinstance(module, compiler.OptimizedModule))
    )


def records_itself(part: nn.Module) -> bool:
    """Whether no call inside the module needs watching, see `modes.watched`."""
    kind = type(part)
    return kind in _SILENT_LAYERS or kind.__dict__.get("records_itself", False)


def running_statistics(parts: Sequence[nn.Module]) -> list[Tensor]:
    """The buffers that norms in training mode update whenever one of these modules runs."""
    return [
        buffer
        for norm in parts
        if isinstance(norm, _NormBase) and norm.training
        for buffer in norm._buffers.values()
        if buffer is not None
    ]
