"""What modules are made of, to find out once, and not in every call, what depends on it.

A snapshot is kept in a module's `__dict__`, refers to the modules below it but not to itself, and
is neither copied nor pickled. Parameters and buffers are not part of it: they may be replaced at
any time, under `torch.func.functional_call` or by FSDP, and are read anew in every call.
"""

from itertools import chain
from operator import is_
from types import NoneType
from typing import TypeVar

from torch import Tensor, nn

_ENTRIES = "_modules _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()

T = TypeVar("T", bound="Snapshot")


class Snapshot:
    """The modules below one: their types, attributes, submodules and hooks, all by identity."""

    def __init__(self, root: nn.Module) -> None:
        self.parts = parts_of(root)[1:]
        self._types = [type(part) for part in self.parts]
        self._entries, self._values = [root._modules], [*root._modules.values()]
        for part in self.parts:
            own = part.__dict__
            self._entries.append(own)
            self._values += map(_mark, own.keys(), own.values())
            for entries in map(own.get, _ENTRIES):
                if isinstance(entries, dict):  # those of scripted modules are fixed, and no dicts
                    self._entries.append(entries)
                    self._values += entries.values()
        self._lengths = [*map(len, self._entries)]
        self._parents = [root._modules, *(part.__dict__.get("_modules") for part in self.parts)]
        self._parents = [modules for modules in self._parents if isinstance(modules, dict)]
        self._children = _values_of(self._parents)

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing has changed; `root` may be a shallow copy."""
        return (
            root._modules is self._entries[0]
            and [*map(len, self._entries)] == self._lengths
            and all(map(is_, map(type, self.parts), self._types))
            and _are(_values_of(self._entries), self._values)
        )

    def has_same_modules(self) -> bool:
        """Whether no module below the root has been replaced; modes, hooks, … may have changed."""
        children = _values_of(self._parents)
        return len(children) == len(self._children) and all(map(is_, children, self._children))

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


def _mark(name: str, value):
    """What stands for an attribute: itself, or its type where it may hold feature maps.

    Those must not live as long as a snapshot. What is derived does not depend on them.
    """
    is_kept = name.startswith("_") or isinstance(value, (nn.Module, str, int, float, NoneType))
    is_kept |= isinstance(value, tuple) and not any(isinstance(v, Tensor) for v in value)
    return value if is_kept else type(value)


def _are(values: list, marks: list) -> bool:
    return all(map(is_, values, marks)) or all(
        value is mark or type(value) is mark for value, mark in zip(values, marks, strict=True)
    )


def _values_of(entries: list[dict]) -> list:
    return [*chain.from_iterable(map(dict.values, entries))]


def snapshot_of(root: nn.Module, kind: type[T]) -> T:
    """Return `kind(root)`, a snapshot, made again only if something below `root` has changed."""
    snapshot = root.__dict__.get("_snapshot")
    if type(snapshot) is not kind or not snapshot.is_current(root):
        snapshot = root.__dict__["_snapshot"] = kind(root)
    return snapshot


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
