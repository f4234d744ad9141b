"""The two runs of a block's transforms.

A `TorchFunctionMode`, which is local to its thread, sees the calls inside a transform. A compiled
or scripted transform hides them: its running statistics are put back after the second run, and the
generators' states are kept whenever it trains.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import norms, sync
from .draws import (
    NotRepeatable,
    draw_again,
    draw_and_keep,
    generator_on,
    is_capturing,
    is_draw,
    state_of,
)
from .held import Held, is_opaque, parts_of, running_statistics
from .quiet import is_quiet

_thread = threading.local()
_kinds: dict = {}


class Run:
    """What one run of a transform drew and measured, in order."""

    __slots__ = ("events", "moved", "parts")

    def __init__(self, module: nn.Module) -> None:
        self.parts = parts_of(module)
        self.events: list = []  # of Kept, State, Statistics
        self.moved: list[Tensor] = []  # running statistics and counters that the first run moved


class Replay:
    """One call of a block: `first` keeps what its transforms do, `second` lets them repeat it."""

    def __init__(self, block: nn.Module, check: bool, tracks_children: bool) -> None:
        self.block = block
        self.members = {block, *block.members()}
        self.check = check  # run each transform twice at once, and compare
        self.tracks_children = tracks_children  # the block calls them itself, not through `run`
        self.held = Held(block)
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
            with _Between(self) if self.tracks_children else contextlib.nullcontext():
                yield
        finally:
            _thread.replay = outer

    def run(self, module: nn.Module, x: tuple, key: Hashable):
        is_first = self.positions is None
        run = self._add_run(key, module) if is_first else self._run_of(key)
        self.is_running = True
        try:
            y = (self._first if is_first else self._second)(run, module, x)
            if is_first and self.check:
                _check_equal(y, self._second(run, module, x))
            return y
        finally:
            self.is_running = False

    def _first(self, run: Run, module: nn.Module, x: tuple):
        if self._is_opaque(run):
            return _first_opaque(run, module, x)
        return _observed(_First(run), module, x, run.parts)

    def _second(self, run: Run, module: nn.Module, x: tuple):
        if self._is_opaque(run):
            return _second_opaque(run, module, x)
        observer = _Second(run)
        with sync.reused(run.parts, observer.events):
            return _observed(observer, module, x, run.parts)

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


def is_replaying(block: nn.Module | None = None) -> bool:
    """Whether this thread is in a run of `block`, or of any."""
    replay = getattr(_thread, "replay", None)
    return replay is not None and (block is None or replay.block is block)


def run(block: nn.Module, name: str, module: nn.Module, *x: Tensor, key: Hashable):
    """Return `module(*x)`, a transform of `block`; `name` and `key` tell it from the others.

    Raises:
        RuntimeError: The transform wrote to its input, or did not repeat its first run.
    """
    if torch.compiler.is_compiling():
        return module(*x)
    versions = _versions(x)
    replay = getattr(_thread, "replay", None)
    if replay is None or block not in replay.members:
        y = module(*x)
    else:
        try:
            y = replay.run(module, x, (id(block), key))
        except NotRepeatable as error:
            raise RuntimeError(f"{type(block).__name__}: {name} {error}") from error
    if versions != _versions(x):
        raise RuntimeError(
            f"{type(block).__name__}: {name} changed its input in place; expected a module that "
            "leaves its input alone (inplace=False), because other transforms read it too"
        )
    return y


def call(func: Callable, *args, **kwargs):
    """Return `func(*args, **kwargs)`; in a second run what it returned in the first.

    For modules in `quiet.TYPES` that draw, normalise by batch statistics or count.
    """
    observer = getattr(_thread, "observer", None)
    if observer is None:
        return func(*args, **kwargs)
    return observer.__torch_function__(func, (), args, kwargs)


def _observed(observer: TorchFunctionMode, module: nn.Module, x: tuple, parts: list[nn.Module]):
    """Run `module` under the observer; quiet modules need not be watched call by call."""
    if not is_quiet(parts):
        with observer:
            return module(*x)
    _thread.observer = observer
    try:
        return module(*x)
    finally:
        _thread.observer = None


def _versions(tensors: tuple) -> list[int]:
    return [t._version for t in tensors if isinstance(t, Tensor) and not t.is_inference()]


class _First(TorchFunctionMode):
    """Runs calls as they are and keeps in `run` what a second run needs."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if kind == "draw":
            return draw_and_keep(self.run.events, func, args, kwargs)
        if kind == "norm":
            return norms.FIRST[func](self.run, *args, **kwargs)
        if _is_counter(args[0]):
            self.run.moved.append(args[0])
        return func(*args, **kwargs)


class _Second(TorchFunctionMode):
    """Repeats what `run` kept, in its order."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.events = iter(run.events)
        self.moved = run.moved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if kind == "draw":
            return draw_again(self.events, func, args, kwargs)
        if kind == "norm":
            return norms.SECOND[func](self.events, *args, **kwargs)
        if any(args[0] is counter for counter in self.moved):
            return args[0]
        return func(*args, **kwargs)


class _Between(TorchFunctionMode):
    """Refuses what a block does between its transforms and could not repeat in `inverse`."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self.replay = replay

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_off = self.replay.is_running or kwargs.get("training") is False
        if not is_off and _kind_of(func) in ("draw", "norm"):
            raise RuntimeError(
                f"{type(self.replay.block).__name__}: forward calls {func.__name__} itself, which "
                "the backward cannot repeat; expected it inside a submodule"
            )
        return func(*args, **kwargs)


def _check_equal(y: Tensor, again: Tensor) -> None:
    if not torch.equal(y, again):
        difference = (y - again).abs().max().item()
        raise NotRepeatable(
            f"is not deterministic: two runs on one input differ by {difference:.3g}; expected the "
            "same bits (random numbers from PyTorch's generators are repeated, others are not)"
        )


def _kind_of(func) -> str | None:
    """What is special about a torch function: "draw", "norm", "count" or nothing."""
    try:
        return _kinds[func]
    except KeyError:
        if func in norms.FIRST:
            kind = "norm"
        elif func is Tensor.add_:
            kind = "count"
        else:
            kind = "draw" if is_draw(func) else None
        _kinds[func] = kind
        return kind


def _is_counter(tensor: Tensor) -> bool:
    """Whether it may be a norm's `num_batches_tracked`."""
    return tensor.dim() == 0 and not tensor.is_floating_point()


def _first_opaque(run: Run, module: nn.Module, x: tuple):
    run.moved += running_statistics(run.parts)
    # A CUDA graph cannot hold states; without layers that drop, none is needed.
    if any(part.training for part in run.parts) and (not is_capturing() or _may_drop(run.parts)):
        run.events += [state_of(generator) for generator in _generators(x)]
    return module(*x)


def _second_opaque(run: Run, module: nn.Module, x: tuple):
    buffers = running_statistics(run.parts)
    before = [buffer.clone() for buffer in buffers]
    now = [state_of(event.generator) for event in run.events]
    for event in run.events:
        event.generator.set_state(event.state)
    try:
        return module(*x)
    finally:
        for generator, state in now:
            generator.set_state(state)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # past the version: the graph saved it, but does not read it


def _may_drop(parts: list[nn.Module]) -> bool:
    return any("drop" in type(part).__name__.lower() and part.training for part in parts)


def _generators(x: tuple) -> list[torch.Generator]:
    devices = {torch.device("cpu"), *(tensor.device for tensor in x)}
    return [generator_on(device) for device in devices]
