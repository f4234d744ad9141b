"""An op's GPU implementation, recorded in one call, repeated on other tensors of its geometry.

An implementation allocates tensors and launches kernels; what it allocates and launches depends
only on devices, dtypes, sizes and strides. Repeated, it allocates its results one by one and all
other memory at once, and hands pointers to Triton's C launchers. An implementation that does
anything else, such as a copy, is called as it is.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.driver import driver

from .compiled import ALIGNMENT, STREAM, Compiled, has_launch_hooks
from .last_program import counters
from .launch import listed_launches

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
    _aten.new_empty.default, _aten.new_empty_strided.default,
}  # fmt: skip
_NEW_COUNTERS = _aten.zeros.default  # of last_program.py
SPACING = 128  # bytes; scratch tensors start at multiples of a cache line
_COUNTERS = 0  # their place in the list of pointers; those of the given tensors follow
_empty_like = torch.empty_like


class _Recorder(TorchDispatchMode):
    """Finds which argument or allocation (its base) a tensor is a view of, and its offset in it."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.bases, self.given = list(arguments), len(arguments)
        self.places = {id(tensor): (base, 0) for base, tensor in enumerate(arguments)}
        self.views: list[Tensor] = []  # alive, so that nothing else has their id
        self.is_repeatable = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.places[id(result)] = len(self.bases), 0
            self.bases.append(result)
        elif function.is_view and isinstance(result, Tensor) and id(args[0]) in self.places:
            base, offset = self.places[id(args[0])]
            self.places[id(result)] = base, offset + result.data_ptr() - args[0].data_ptr()
            self.views.append(result)
        else:
            self.is_repeatable &= function is _NEW_COUNTERS
        return result

    def allocation_of(self, result: Any) -> int | None:
        """Which allocation the result is, in whole, if `empty_like` makes such another."""
        base, offset = self.places.get(id(result), (-1, 0))
        if base < self.given or offset or result.numel() != self.bases[base].numel():
            return None
        return base if torch.empty_like(result).stride() == result.stride() else None


class _Recording(NamedTuple):
    """How to repeat an implementation."""

    driver: Any  # of Triton, and its device: where it was recorded
    current: Any
    prototypes: list[Tensor]  # of what to allocate: the results, then perhaps scratch memory
    groups: int  # of programs that count themselves
    inside: list[tuple[int, int]]  # derived pointers: (slot of the pointer, bytes to add)
    # By launch: launcher, what it takes, and the places of pointers and of tuples of them.
    launches: list[tuple[Callable, list, list[tuple[int, int]], list[tuple[int, Callable]]]]
    pack: Callable[[list], Any] | None  # makes the op's results of them; None: the first alone
    kernels: list[Compiled]  # of the launches, kept alive


_NOT_RECORDED = _Recording(None, None, [], 0, [], [], None, [])


class Recorded:
    """An implementation with its arguments, repeated with other tensors in their places.

    Args:
        given: Returns the implementation's arguments with these tensors among them.
        device: Of the tensors.
    """

    def __init__(self, implementation: Callable, given: Callable, device: torch.device) -> None:
        self.implementation, self.given, self.device = implementation, given, device
        self.plan = _NOT_RECORDED
        self.refused: tuple | None = None  # driver and device where it cannot be repeated

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        pointers, bits = [0], 0
        for tensor in tensors:
            pointer = tensor.data_ptr()
            bits |= pointer
            pointers.append(pointer)
        active = driver.active
        current = active.get_current_device()
        recorded_by, recorded_on, prototypes, groups, inside, launches, pack, _ = self.plan
        is_as_recorded = active is recorded_by and current == recorded_on
        if not is_as_recorded or bits % ALIGNMENT or has_launch_hooks():
            return self._call(tensors, bits, active, current)
        stream, allocated = active.get_current_stream(current), []
        for prototype in prototypes:
            tensor = _empty_like(prototype)
            allocated.append(tensor)
            pointers.append(tensor.data_ptr())
        if groups:
            kept = counters(self.device, groups, stream)
            pointers[_COUNTERS] = kept.data_ptr()
        for slot, offset in inside:
            pointers.append(pointers[slot] + offset)
        for launcher, frame, slots, picks in launches:
            frame = frame.copy()
            frame[STREAM] = stream
            for place, slot in slots:
                frame[place] = pointers[slot]
            for place, pick in picks:
                frame[place] = pick(pointers)
            launcher(*frame)
        return allocated[0] if pack is None else pack(allocated)

    def _call(self, tensors: Sequence[Tensor], bits: int, active: Any, current: Any) -> Any:
        """Call the implementation; record it if that is possible and has not been done."""
        is_elsewhere = self.device.index not in (None, current)
        is_refused = is_elsewhere or self.refused == (active, current)
        if is_refused or bits % ALIGNMENT or has_launch_hooks():
            return self.implementation(*self.given(tensors))
        recorder = _Recorder(tensors)
        with listed_launches() as listed, recorder:
            results = self.implementation(*self.given(tensors))
        allocated = [recorder.allocation_of(leaf) for leaf in tree_leaves(results)]
        used = _tensors_of(listed)
        is_repeatable = (
            recorder.is_repeatable
            and all(compiled is not None for compiled, _ in listed)
            and None not in allocated
            and len(set(allocated)) == len(allocated)
            and all(id(t) in recorder.places or t.dtype == torch.int32 for t in used)  # counters
        )
        if is_repeatable:
            self.plan = _plan(recorder, listed, results, allocated, active, current)
        else:
            self.refused = active, current
        return results


def _tensors_of(listed: Iterable[tuple[Any, dict[str, Any]]]) -> list[Tensor]:
    """The operands of launches that are tensors."""
    leaves = tree_leaves([[*operands.values()] for _, operands in listed])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _plan(
    recorder: _Recorder, listed: Sequence[tuple], results: Any, allocated: list,
    active: Any, current: Any,
) -> _Recording:  # fmt: skip
    """The plan for a recorded call whose results are these allocations."""
    used = _tensors_of(listed)
    places = {id(tensor): recorder.places.get(id(tensor), (None, 0)) for tensor in used}
    bases = dict.fromkeys(base for base, _ in places.values() if base is not None)
    scratch = [base for base in bases if base >= recorder.given and base not in allocated]
    ends = [*itertools.accumulate(_spaced(recorder.bases[base]) for base in scratch)]
    prototypes = [_without_memory(result) for result in tree_leaves(results)]
    slots = [*range(recorder.given), *allocated]
    starts = {base: (slot, 0) for slot, base in enumerate(slots, _COUNTERS + 1)}
    starts[None] = _COUNTERS, 0
    end = _COUNTERS + 1 + len(slots)
    if scratch:
        device = recorder.bases[0].device
        memory = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        prototypes.append(_without_memory(memory))
        starts |= {base: (end, first) for base, first in zip(scratch, [0, *ends], strict=False)}
        end += 1
    found = {}  # by operand: its base's slot, and its distance in bytes
    for identity, (base, offset) in places.items():
        slot, start = starts[base]
        found[identity] = slot, start + offset
    inside = [*dict.fromkeys(place for place in found.values() if place[1])]
    slot_of = {
        identity: end + inside.index(place) if place[1] else place[0]
        for identity, place in found.items()
    }
    return _Recording(
        active,
        current,
        prototypes,
        max([tensor.numel() for tensor in used if places[id(tensor)][0] is None], default=0),
        inside,
        [_repeat(compiled, operands, slot_of) for compiled, operands in listed],
        _packer(results),
        [compiled for compiled, _ in listed],
    )


def _repeat(compiled: Compiled, operands: dict[str, Any], slot_of: dict[int, int]) -> tuple:
    """A launch of a plan: its launcher, what that takes, and the places of pointers there."""
    frame, slots, picks = compiled.frame.copy(), [], []
    for name, value in operands.items():
        place = compiled.places[name]
        if isinstance(value, Tensor):
            slots.append((place, slot_of[id(value)]))
        elif isinstance(value, tuple) and any(isinstance(leaf, Tensor) for leaf in value):
            picks.append((place, picker([slot_of[id(leaf)] for leaf in value])))
        else:
            frame[place] = value
    return compiled.launcher, frame, slots, picks


def picker(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    """A function that returns a sequence's items at these places, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda items: tuple([items[place] for place in places])


def _spaced(tensor: Tensor) -> int:
    """Bytes that a tensor takes of scratch memory."""
    return -(-tensor.numel() * tensor.itemsize // SPACING) * SPACING


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor without memory, of which `empty_like` makes one like `tensor`."""
    prototype = torch.empty_like(tensor)
    prototype.untyped_storage().resize_(0)
    return prototype


def _packer(results: Any) -> Callable[[list], Any] | None:
    """What makes a list of tensors, and perhaps more, into a structure like `results`."""
    if isinstance(results, Tensor):
        return None
    kind, count = type(results), len(results)
    if all(isinstance(result, Tensor) for result in results):
        return lambda tensors: kind(tensors[:count])
    counts = [len(tree_leaves(result)) for result in results]
    ends = itertools.accumulate(counts)
    parts = [slice(end - size, end) for size, end in zip(counts, ends, strict=True)]
    packers = [*zip(map(_packer, results), parts, strict=True)]
    return lambda tensors: kind(
        [pack(tensors[part]) if pack else tensors[part][0] for pack, part in packers]
    )
