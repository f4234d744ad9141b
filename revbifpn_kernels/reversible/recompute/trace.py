"""The two runs of a block's transforms, and what is kept between them."""

import contextlib
import threading
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn

from . import sync_batch_norm as sync
from .modes import Between, First, Run, Second, check_equal, first_opaque, observed, second_opaque
from .module_state import Held, is_opaque
from .rng import NotRepeatable

_thread = threading.local()


class Replay:
    """One call of a block: `first` keeps what its transforms do, `second` lets them repeat it."""

    def __init__(self, block: nn.Module, check: bool) -> None:
        self.block = block
        self.members = _members_of(block)
        self.check = check  # run each transform twice at once, and compare
        self.tracks_children = any(member.calls_transforms for member in self.members)
        self.held = Held(block)
        self.stand_ins: dict[int, Tensor] = {}
        self.runs: dict[Hashable, list[Run]] = {}
        self.positions: dict[Hashable, int] | None = None  # None in the first run
        self.is_reversed = False
        self.is_running = False
        self.autocast: dict = {}

    def moved(self) -> list[Tensor]:
        return [tensor for runs in self.runs.values() for run in runs for tensor in run.moved]

    def kept(self) -> list[Tensor]:
        """The tensors kept for the second run: masks, generators' states, statistics."""
        every = (run for runs in self.runs.values() for run in runs)
        return [tensor for run in every for event in run.events for tensor in event.tensors()]

    @contextlib.contextmanager
    def first(self, x: Tensor) -> Iterator[None]:
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
    def second(self, *, is_reversed: bool = False) -> Iterator[None]:
        """Run transforms again; `is_reversed` if the calls of each come in the opposite order."""
        self.positions, self.is_reversed = {}, is_reversed
        with torch.autocast(**self.autocast), self._active():
            yield

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        outer = getattr(_thread, "replay", None)
        _thread.replay = self
        try:
            with self._between():
                yield
        finally:
            _thread.replay = outer

    def _between(self) -> contextlib.AbstractContextManager:
        if not self.tracks_children:
            return contextlib.nullcontext()
        return Between(type(self.block).__name__, lambda: self.is_running, self.stand_ins)

    def run(self, module: nn.Module, x: tuple, key: Hashable):
        is_first = self.positions is None
        run = self._add_run(key, module) if is_first else self._run_of(key)
        self.is_running = True
        try:
            y = (self._first if is_first else self._second)(run, module, x)
            if run.is_checkpointed:  # not raised inside, which would leave its hooks behind
                raise NotRepeatable(
                    "draws or normalises under torch.utils.checkpoint, which would run it a third "
                    "time; a reversible block recomputes already, so take the checkpoint out"
                )
            if is_first and self.check:
                check_equal(y, self._second(run, module, x))
            return y
        finally:
            self.is_running = False

    def _first(self, run: Run, module: nn.Module, x: tuple):
        if self._is_opaque(run):
            return first_opaque(run, module, x)
        return observed(First(run, self.held.counters), module, x, run.parts)

    def _second(self, run: Run, module: nn.Module, x: tuple):
        if self._is_opaque(run):
            return second_opaque(run, module, x)
        observer = Second(run, self.stand_ins)
        with sync.reused(run.parts, observer.events):
            return observed(observer, module, x, run.parts)

    def _is_opaque(self, run: Run) -> bool:
        return self.held.has_opaque and any(is_opaque(part) for part in run.parts)

    def _add_run(self, key: Hashable, module: nn.Module) -> Run:
        run = Run(module)
        self.runs.setdefault(key, []).append(run)
        return run

    def _run_of(self, key: Hashable) -> Run:
        runs, position = self.runs.get(key, []), self.positions.get(key, 0)
        if position >= len(runs):
            raise NotRepeatable("runs more often in the backward than it did in the forward")
        self.positions[key] = position + 1
        return runs[-1 - position if self.is_reversed else position]


class Tracked:
    """A submodule of a block that calls its transforms itself: calls go through `run`."""

    def __init__(self, block: nn.Module, name: str, module: nn.Module) -> None:
        self._block, self._name, self._module = block, name, module

    def _wrap(self, name: str, value):
        if isinstance(value, nn.Module):
            return Tracked(self._block, f"{self._name}.{name}", value)
        return value

    def __call__(self, *x, **options):
        if options:
            raise NotRepeatable(f"{self._name} must be called without keyword arguments")
        return run(self._block, self._name, self._module, *x, key=id(self._module))

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


def _members_of(block: nn.Module) -> set[nn.Module]:
    return {block}.union(*(_members_of(member) for member in block.members()))


def is_replaying(block: nn.Module | None = None) -> bool:
    """Whether this thread is in a run of `block`, or of any."""
    replay = getattr(_thread, "replay", None)
    return replay is not None and (block is None or block in replay.members)


def may_leave_norm(module: nn.Module) -> bool:
    """Whether who runs this transform takes a `ScaledSource` as well as maps."""
    return getattr(_thread, "norm_left_by", None) is module


def run(
    block: nn.Module,
    name: str,
    module: nn.Module,
    *x: Tensor,
    key: Hashable,
    leaves_norm: bool = False,
):
    """Return `module(*x)`, a transform of `block`; `name` and `key` tell it from the others.

    Args:
        leaves_norm: Whether the result may be a `ScaledSource`, maps before their last norm.

    Raises:
        RuntimeError: The transform wrote to its input, or did not repeat its first run.
    """
    if torch.compiler.is_compiling():
        return module(*x)
    versions = _versions(x)
    replay = getattr(_thread, "replay", None)
    outer = getattr(_thread, "norm_left_by", None)
    _thread.norm_left_by = module if leaves_norm else None
    try:
        if replay is None or block not in replay.members:
            y = module(*x)
        else:
            y = replay.run(module, x, (id(block), key))
    except NotRepeatable as error:
        raise RuntimeError(f"{type(block).__name__}: {name} {error}") from error
    finally:
        _thread.norm_left_by = outer
    if versions != _versions(x):
        raise RuntimeError(
            f"{type(block).__name__}: {name} changed its input in place; expected a module that "
            "leaves its input alone (inplace=False), because other transforms read it too"
        )
    return y


def _versions(tensors: tuple) -> list[int]:
    return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]
