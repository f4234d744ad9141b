"""The trace of one call of a block: its transforms' records, made in the forward and repeated."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from ...compiler.tags import in_transform
from . import batch_norm, modes
from .checks import NotRepeatable, check_equal
from .module_state import ModuleState, is_opaque

_thread = threading.local()


class BlockTrace:
    """One call of a block: `recording` saves what transforms do, `recomputing` repeats it."""

    def __init__(self, block: nn.Module, check: bool) -> None:
        self.block = block
        self.members = _members_of(block)
        self.check = check  # recompute each transform at once, and compare
        self.tracks_children = any(member.calls_transforms for member in self.members)
        self.state = ModuleState(block)
        self.stand_ins: dict[int, Tensor] = {}
        self.records: dict[Hashable, list[modes.CallRecord]] = {}  # of each transform, by its key
        self.positions: dict[Hashable, int] | None = None  # None while recording
        self.is_reversed = False
        self.is_in_transform = False
        self.autocast: dict = {}

    def updated_buffers(self) -> list[Tensor]:
        """The running statistics and counters that the forward updated."""
        return [
            buffer for calls in self.records.values() for call in calls for buffer in call.updated
        ]

    @contextlib.contextmanager
    def recording(self, x: Tensor) -> Iterator[None]:
        self.positions = None
        device = x.device.type
        self.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        # The cache would keep casts made without a graph, or of weights that change later.
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with self._active():
                yield
        finally:
            torch.set_autocast_cache_enabled(caches)

    @contextlib.contextmanager
    def recomputing(self, *, is_reversed: bool = False) -> Iterator[None]:
        """Run transforms again; `is_reversed` if the calls of each come in the opposite order."""
        self.positions, self.is_reversed = {}, is_reversed
        with torch.autocast(**self.autocast), self._active():
            yield

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        outer = getattr(_thread, "trace", None)
        _thread.trace = self
        guard = contextlib.nullcontext()
        if self.tracks_children:
            name = type(self.block).__name__
            guard = modes.GuardMode(name, lambda: self.is_in_transform, self.stand_ins)
        try:
            with guard:
                yield
        finally:
            _thread.trace = outer

    def run(self, module: nn.Module, function: Callable, x: tuple, key: Hashable):
        """Return `function(*x)`, a call of `module` or of its method, recorded or repeated."""
        is_recording = self.positions is None
        if is_recording:
            record = modes.CallRecord(self.state.snapshot.transform(module))
            self.records.setdefault(key, []).append(record)
        else:
            record = self._record_of(key)
        self.is_in_transform = True
        try:
            y = self._run(record, is_recording, function, x)
            if record.is_checkpointed:  # raised here: inside, its hooks would stay
                raise NotRepeatable(
                    "draws or normalises under torch.utils.checkpoint, which would run it a third "
                    "time; a reversible block recomputes already, so take the checkpoint out"
                )
            if is_recording and self.check:
                check_equal(y, self._run(record, False, function, x))
            return y
        finally:
            self.is_in_transform = False

    def _run(self, record: modes.CallRecord, is_recording: bool, function: Callable, x: tuple):
        if self.state.has_opaque and any(map(is_opaque, record.transform.parts)):
            run_opaque = modes.record_opaque if is_recording else modes.replay_opaque
            return run_opaque(record, function, x)
        if is_recording:
            return modes.watched(modes.RecordMode(record, self.state), function, x)
        recorder = modes.ReplayMode(record, self.stand_ins)
        if not record.transform.synchronised:
            return modes.watched(recorder, function, x)
        with batch_norm.reused(record.transform.synchronised, recorder):
            return modes.watched(recorder, function, x)

    def _record_of(self, key: Hashable) -> modes.CallRecord:
        records, position = self.records.get(key, []), self.positions.get(key, 0)
        if position >= len(records):
            raise NotRepeatable("runs more often in the backward than it did in the forward")
        self.positions[key] = position + 1
        return records[-1 - position if self.is_reversed else position]


def _members_of(block: nn.Module) -> set[nn.Module]:
    return {block}.union(*(_members_of(member) for member in block.members()))


def is_traced(block: nn.Module | None = None) -> bool:
    """Whether this thread is in a recorded or recomputed call of `block` (None: of any block)."""
    trace = getattr(_thread, "trace", None)
    return trace is not None and (block is None or block in trace.members)


class TrackedModule:
    """A submodule of a block that calls its transforms itself: calls go through the trace."""

    def __init__(self, block: nn.Module, name: str, module: nn.Module) -> None:
        self._block, self._name, self._module = block, name, module

    def _wrap(self, name: str, value):
        if isinstance(value, nn.Module):
            return TrackedModule(self._block, f"{self._name}.{name}", value)
        return value

    def __call__(self, *x, **options):
        if options:
            raise NotRepeatable(f"{self._name} must be called without keyword arguments")
        return run_transform(self._block, self._name, self._module, *x, key=id(self._module))

    def __getattr__(self, name: str):
        return self._wrap(name, getattr(self._module, name))

    def __getitem__(self, key):
        return self._wrap(str(key), self._module[key])

    def __iter__(self):
        return (self._wrap(str(k), value) for k, value in enumerate(self._module))

    def __len__(self) -> int:
        return len(self._module)

    def __bool__(self) -> bool:
        return True

    def items(self):
        return [(k, self._wrap(k, value)) for k, value in self._module.items()]

    def values(self):
        return [value for _, value in self.items()]


def run_transform(
    block: nn.Module,
    name: str,
    module: nn.Module,
    *x: Tensor,
    key: Hashable = None,
    folds_norm: bool = False,
    is_rerun: bool = False,
):
    """Return `module(*x)`, a transform of `block`.

    Args:
        name: For messages; tells the transform from the others unless there is a `key`.
        folds_norm: Whether the caller applies a norm that the transform leaves to it: a module that
            has `forward_folded` is then called by that method, and may return a `ScaledSource`.
        is_rerun: Whether the caller takes a `Pullback` as well: then a module that has
            `rerun_folded` is called by that method instead.

    Raises:
        RuntimeError: The transform wrote to its input, or its recompute did something else.
    """
    function = module
    if folds_norm and is_rerun and hasattr(type(module), "rerun_folded"):
        function = module.rerun_folded
    elif folds_norm and hasattr(type(module), "forward_folded"):
        function = module.forward_folded
    if torch.compiler.is_compiling():
        with in_transform(name):
            return function(*x)
    versions = _versions(x)
    trace = getattr(_thread, "trace", None)
    try:
        if trace is None or block not in trace.members:
            y = function(*x)
        else:
            y = trace.run(module, function, x, (id(block), key or name))
    except NotRepeatable as error:
        raise RuntimeError(f"{type(block).__name__}: {name} {error}") from error
    if versions != _versions(x):
        raise RuntimeError(
            f"{type(block).__name__}: {name} changed its input in place; expected a module that "
            "leaves its input alone (inplace=False), because other transforms read it too"
        )
    return y


def _versions(tensors: tuple) -> list[int]:
    return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
