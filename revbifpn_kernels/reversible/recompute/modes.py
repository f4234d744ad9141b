"""Watch the torch calls inside a transform by a `TorchFunctionMode`, which is local to its thread.

A compiled or scripted transform hides its calls: its running statistics are put back after the
recompute, and the generators' states are saved whenever it trains.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from . import batch_norm, rng
from .checks import NotRepeatable
from .module_state import ModuleState, Transform, running_statistics

_thread = threading.local()
_kinds: dict = {}


class CallRecord:
    """What one call of a transform drew, measured and decided in the forward, each in order."""

    __slots__ = ("decisions", "events", "is_checkpointed", "transform", "updated")

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.is_checkpointed = False  # torch.utils.checkpoint would run the recompute again
        self.events: list = []  # Tensor, SavedGenerator, Statistics, SavedStages
        self.updated: list[Tensor] = []  # running statistics and counters that the forward updated
        self.decisions: list = []


def call(func: Callable, *args, **kwargs):
    """Return `func(*args, **kwargs)`, recorded; in a recompute what it returned in the forward.

    For modules that set `records_itself`, see `watched`.
    """
    recorder = current_recorder()
    if recorder is None or recorder.is_watching:
        return func(*args, **kwargs)
    return recorder.__torch_function__(func, (), args, kwargs)


def decide(func: Callable, *args):
    """Return `func(*args)`, recorded; in a recompute what it returned in the forward."""
    recorder = current_recorder()
    return func(*args) if recorder is None else recorder.decide(func, *args)


def current_recorder() -> "RecordMode | ReplayMode | None":
    """The recorder of the transform that this thread runs: to `save` in, or to get `saved` from."""
    return getattr(_thread, "recorder", None)


def watched(recorder: "RecordMode | ReplayMode", function: Callable, x: tuple):
    """Return `function(*x)`, watched call by call unless all modules record themselves.

    Watching costs about 5 µs per call of torch, a tenth of a small network's step. A module class
    whose draws, batch norms and counters go through `call`, if it has any, sets
    `records_itself = True`. Subclasses do not inherit it, because their methods may call anything.
    """
    transform = recorder.record.transform
    needs_watching = (
        not transform.records_itself
        or any(transform.hooks)
        or (not recorder.is_recording and recorder.stand_ins)
    )
    _thread.recorder = recorder
    try:
        if not needs_watching:
            return function(*x)
        recorder.is_watching = True
        with recorder:
            return function(*x)
    finally:
        _thread.recorder = None


class RecordMode(TorchFunctionMode):
    """Runs calls as they are and writes to `record` what the recompute needs."""

    is_recording, is_watching = True, False

    def __init__(self, record: CallRecord, state: ModuleState) -> None:
        super().__init__()
        self.record, self.state = record, state

    def decide(self, func: Callable, *args):
        decision = func(*args)
        self.record.decisions.append(decision)
        return decision

    def save(self, event, updated: Iterable[Tensor | None]) -> None:
        """Save `event` for the recompute, which must not change the buffers in `updated` again."""
        if event is not None:
            self.record.events.append(event)
        self.record.updated += [buffer for buffer in updated if buffer is not None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if kind == "draw":
            return rng.draw_and_save(self.record.events, func, args, kwargs)
        if kind == "norm":
            return batch_norm.NORMS[func](self, *args, **kwargs)
        if kind == "hidden norm":
            raise NotRepeatable(
                f"calls {func.__name__}, whose running statistics would be updated twice; expected "
                "torch.nn.functional's batch_norm or instance_norm"
            )
        if id(args[0]) in self.state.counters:
            self.record.updated.append(args[0])
        return func(*args, **kwargs)


class ReplayMode(TorchFunctionMode):
    """Repeats what the forward wrote to `record`, in its order.

    `stand_ins`, by id, replace parameters whose hooks must not see the inner gradient.
    """

    is_recording, is_watching = False, False

    def __init__(self, record: CallRecord, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.record, self.stand_ins = record, stand_ins
        self.events, self.decisions = iter(record.events), iter(record.decisions)

    def decide(self, func: Callable, *args):
        try:
            return next(self.decisions)
        except StopIteration:
            raise NotRepeatable("called an MBConv more often than in the forward") from None

    def saved(self, kind: type):
        """Return the next event, which must be of this kind."""
        self.record.is_checkpointed |= _is_checkpointed()
        event = next(self.events, None)
        if not isinstance(event, kind):
            raise NotRepeatable("normalised a batch, which it did not do there in the forward")
        return event

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = _substituted(args, kwargs or {}, self.stand_ins)
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        self.record.is_checkpointed |= _is_checkpointed()
        if kind == "draw":
            return rng.repeat_draw(self.events, func, args, kwargs)
        if kind == "norm":
            return batch_norm.NORMS[func](self, *args, **kwargs)
        if kind == "count" and any(args[0] is counter for counter in self.record.updated):
            return args[0]
        return func(*args, **kwargs)


class GuardMode(TorchFunctionMode):
    """Refuses draws and norms outside a block's transforms, which `inverse` could not repeat."""

    def __init__(self, name: str, is_in_transform: Callable[[], bool], stand_ins) -> None:
        super().__init__()
        self.name, self.is_in_transform, self.stand_ins = name, is_in_transform, stand_ins

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = _substituted(args, kwargs or {}, self.stand_ins)
        is_special = _kind_of(func) in ("draw", "norm") and kwargs.get("training") is not False
        if is_special and not self.is_in_transform():
            raise RuntimeError(
                f"{self.name}: forward calls {func.__name__} itself, which the backward cannot "
                "repeat; expected it inside a submodule"
            )
        return func(*args, **kwargs)


def _substituted(args: tuple, kwargs: dict, stand_ins: Mapping[int, Tensor]) -> tuple[tuple, dict]:
    """The arguments with the tensors that have a stand-in replaced by it."""
    if not stand_ins:
        return args, kwargs
    return tree_map_only(Tensor, lambda t: stand_ins.get(id(t), t), (args, kwargs))


def _is_checkpointed() -> bool:
    """Whether this runs inside `torch.utils.checkpoint(…, use_reentrant=False)` in a backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook")


def _kind_of(func) -> str | None:
    """What a torch function is: "draw", "norm", "hidden norm", "count", or None if none of them."""
    try:
        return _kinds[func]
    except KeyError:
        if func in batch_norm.NORMS:
            kind = "norm"
        elif func is Tensor.add_:
            kind = "count"
        elif getattr(func, "__name__", "") in batch_norm.HIDDEN:
            kind = "hidden norm"
        else:
            kind = "draw" if rng.is_draw(func) else None
        _kinds[func] = kind
        return kind


def record_opaque(record: CallRecord, function: Callable, x: tuple):
    """Return `function(*x)`, a transform whose calls cannot be seen; save generators' states."""
    record.updated += running_statistics(record.transform.parts)
    is_training = any(part.training for part in record.transform.parts)
    # A CUDA graph cannot save generator states; without dropout layers none is needed.
    may_drop = any(
        "drop" in type(p).__name__.lower() and p.training for p in record.transform.parts
    )
    if is_training and (may_drop or not rng.is_capturing()):
        devices = {torch.device("cpu"), *(tensor.device for tensor in x)}
        generators = map(rng.generator_on, devices)
        record.events += map(rng.saved_generator, generators)
    return function(*x)


def replay_opaque(record: CallRecord, function: Callable, x: tuple):
    """Return `function(*x)` with the forward's random numbers; put running statistics back."""
    buffers = running_statistics(record.transform.parts)
    before = [buffer.clone() for buffer in buffers]
    try:
        with rng.rewound(record.events):
            return function(*x)
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # keeps the version: the graph saved it, but does not read it
