"""What modules are made of, to find out once, and not in every call, what depends on it.

A snapshot is kept in a module's `__dict__`, refers to the modules below it but not to itself, and
is neither copied nor pickled. Parameters and buffers are not part of it: they may be replaced at
any time, under `torch.func.functional_call` or by FSDP, and are read anew in every call.
"""

from itertools import chain
from operator import is_
from typing import TypeVar

from torch import nn

_ENTRIES = "_modules _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()

T = TypeVar("T", bound="Snapshot")


class Snapshot:
    """The modules below one: their types, attributes, submodules and hooks, all by identity."""

    def __init__(self, root: nn.Module) -> None:
        self.parts = parts_of(root)[1:]
        self._types = [type(part) for part in self.parts]
        self._entries = [root._modules]
        for part in self.parts:
            own = part.__dict__
            found = map(own.get, _ENTRIES)  # those of scripted modules are fixed, and no dicts
            self._entries += [own, *(entries for entries in found if isinstance(entries, dict))]
        self._lengths = [*map(len, self._entries)]
        self._values = [*chain.from_iterable(map(dict.values, self._entries))]

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing has changed; `root` may be a shallow copy."""
        return (
            root._modules is self._entries[0]
            and [*map(len, self._entries)] == self._lengths
            and all(map(is_, map(type, self.parts), self._types))
            and all(map(is_, chain.from_iterable(map(dict.values, self._entries)), self._values))
        )

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


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
