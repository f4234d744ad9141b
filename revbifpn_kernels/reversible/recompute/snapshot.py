"""Snapshots of a module's structure, so that what depends on it is derived once, not in every call.

A snapshot is kept in the `__dict__` of its root module. It refers to the modules below the root,
not to the root, and is neither copied nor pickled. Parameters and buffers are not part of it: they
may be replaced at any time, under `torch.func.functional_call` or by FSDP, and are read in every
call.
"""

from itertools import chain
from operator import is_
from types import NoneType
from typing import TypeVar

from torch import Tensor, nn

# The dictionaries of a module whose values are compared, beside its own `__dict__`.
_DICTS = "_modules _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()

T = TypeVar("T", bound="Snapshot")


class Snapshot:
    """The types, attributes, submodules and hooks of all modules below a root, by identity.

    Subclasses add what they derive from them.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parts = parts_of(root)[1:]
        self._types = [type(part) for part in self.parts]
        self._dicts, self._marks = [root._modules], [*root._modules.values()]
        for part in self.parts:
            own = part.__dict__
            self._dicts.append(own)
            self._marks += map(_mark, own.keys(), own.values())
            for entries in map(own.get, _DICTS):
                if isinstance(entries, dict):  # scripted modules have others, which cannot change
                    self._dicts.append(entries)
                    self._marks += entries.values()
        self._lengths = [*map(len, self._dicts)]
        submodules = root._modules, *(part.__dict__.get("_modules") for part in self.parts)
        self._submodules = [entries for entries in submodules if isinstance(entries, dict)]
        self._children = _values_of(self._submodules)

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing has changed; `root` may be a copy that now has submodules of its own."""
        return (
            root._modules is self._dicts[0]
            and [*map(len, self._dicts)] == self._lengths
            and all(map(is_, map(type, self.parts), self._types))
            and _match(_values_of(self._dicts), self._marks)
        )

    def has_same_modules(self) -> bool:
        """Whether no module below the root was replaced; attributes and hooks may have changed."""
        children = _values_of(self._submodules)
        return len(children) == len(self._children) and all(map(is_, children, self._children))

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


def _mark(name: str, value):
    """What a snapshot keeps of an attribute: itself, or only its type if it may hold feature maps.

    A snapshot must not keep feature maps alive, and nothing is derived from them.
    """
    is_kept = name.startswith("_") or isinstance(value, (nn.Module, str, int, float, NoneType))
    is_kept |= isinstance(value, tuple) and not any(isinstance(v, Tensor) for v in value)
    return value if is_kept else type(value)


def _match(values: list, marks: list) -> bool:
    # First by identity alone, which is faster, and enough where all attributes are kept themselves.
    return all(map(is_, values, marks)) or all(
        value is mark or type(value) is mark for value, mark in zip(values, marks, strict=True)
    )


def _values_of(dicts: list[dict]) -> list:
    return [*chain.from_iterable(map(dict.values, dicts))]


def snapshot_of(root: nn.Module, kind: type[T]) -> T:
    """Return the snapshot `kind(root)` of an earlier call, or a new one if anything has changed."""
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
