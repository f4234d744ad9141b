"""How calls inside a transform are seen: by a `TorchFunctionMode`, which is local to its thread.

A compiled or scripted transform hides them: its running statistics are put back after the second
run, and the generators' states are kept whenever it trains.
"""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import batch_norm as norms
from .module_state import parts_of, running_statistics
from .quiet import is_quiet
from .rng import (
    NotRepeatable,
    draw_again,
    draw_and_keep,
    generator_on,
    is_capturing,
    is_draw,
    state_of,
)

_thread = threading.local()
_kinds: dict = {}


class Run:
    """What one run of a transform drew and measured, in order."""

    __slots__ = ("events", "is_checkpointed", "moved", "parts", "plans")

    def __init__(self, module: nn.Module) -> None:
        self.parts = parts_of(module)
        self.is_checkpointed = False  # the second run is, and a third would follow
        self.events: list = []  # of Kept, State, Statistics, SharedStatistics
        self.moved: list[Tensor] = []  # running statistics and counters that the first run moved
        self.plans: list = []  # what modules decided in the first run, in order


def call(func: Callable, *args, **kwargs):
    """Return `func(*args, **kwargs)`; in a second run what it returned in the first.

    For modules in `quiet.TYPES` that draw, normalise by batch statistics or count.
    """
    observer = getattr(_thread, "observer", None)
    if observer is None:
        return func(*args, **kwargs)
    return observer.__torch_function__(func, (), args, kwargs)


def recorder() -> "First | Second | None":
    """What a module that keeps its own numbers between its two runs hands them to."""
    return getattr(_thread, "recorder", None)


def observed(observer: "First | Second", module: nn.Module, x: tuple, parts: list[nn.Module]):
    """Run `module` under the observer; quiet modules need not be watched call by call."""
    _thread.recorder = observer
    try:
        if getattr(observer, "stand_ins", None) or not is_quiet(parts):
            with observer:
                return module(*x)
        _thread.observer = observer
        return module(*x)
    finally:
        _thread.observer = _thread.recorder = None


class First(TorchFunctionMode):
    """Runs calls as they are and keeps in `run` what a second run needs."""

    def __init__(self, run: Run, counters: set[int]) -> None:
        super().__init__()
        self.run = run
        self.counters = counters

    def plan(self, decide: Callable):
        """What `decide` says, in the second run, too."""
        self.run.plans.append(decide())
        return self.run.plans[-1]

    def recall(self, kind: type) -> None:
        """Nothing yet."""

    def remember(self, event, moved: list[Tensor]) -> None:
        """Keep `event` for the second run, which must not move the buffers `moved` again."""
        self.run.events.append(event)
        self.run.moved += moved

    def used(self, parameter: Tensor | None) -> Tensor | None:
        return parameter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if kind == "draw":
            return draw_and_keep(self.run.events, func, args, kwargs)
        if kind == "norm":
            return norms.FIRST[func](self.run, *args, **kwargs)
        if kind == "hidden norm":
            raise NotRepeatable(
                f"calls {func.__name__}, whose running statistics would move twice; expected "
                "torch.nn.functional's batch_norm or instance_norm"
            )
        if id(args[0]) in self.counters:
            self.run.moved.append(args[0])
        return func(*args, **kwargs)


class Second(TorchFunctionMode):
    """Repeats what `run` kept, in its order.

    `stand_ins` take the place of parameters, by id, whose hooks must not see the inner gradient.
    """

    def __init__(self, run: Run, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.run = run
        self.events, self.plans = iter(run.events), iter(run.plans)
        self.stand_ins = stand_ins

    def plan(self, decide: Callable):
        """What was decided there in the first run."""
        try:
            return next(self.plans)
        except StopIteration:
            raise NotRepeatable("called an MBConv more often than in its first run") from None

    def recall(self, kind: type):
        """What the first run remembered there."""
        self.run.is_checkpointed |= _is_checkpointed()
        event = next(self.events, None)
        if not isinstance(event, kind):
            raise NotRepeatable("normalised a batch, which it did not do there in its first run")
        return event

    def used(self, parameter: Tensor | None) -> Tensor | None:
        """What takes a parameter's place."""
        return self.stand_ins.get(id(parameter), parameter)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.stand_ins:
            args, kwargs = substituted((args, kwargs), self.stand_ins)
        kind = _kind_of(func)
        if kind is None or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        self.run.is_checkpointed |= _is_checkpointed()
        if kind == "draw":
            return draw_again(self.events, func, args, kwargs)
        if kind == "norm":
            return norms.SECOND[func](self.events, *args, **kwargs)
        if kind == "hidden norm":
            return func(*args, **kwargs)
        if any(args[0] is counter for counter in self.run.moved):
            return args[0]
        return func(*args, **kwargs)


def _is_checkpointed() -> bool:
    """Whether calls are in `torch.utils.checkpoint(…, use_reentrant=False)`, within a backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook")


def substituted(values, stand_ins: Mapping[int, Tensor]):
    """`values` with the tensors that have a stand-in replaced by it."""
    return tree_map_only(Tensor, lambda tensor: stand_ins.get(id(tensor), tensor), values)


class Between(TorchFunctionMode):
    """Refuses what a block does between its transforms and could not repeat in `inverse`."""

    def __init__(self, name: str, is_running: Callable[[], bool], stand_ins) -> None:
        super().__init__()
        self.name, self.is_running, self.stand_ins = name, is_running, stand_ins

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.stand_ins:
            args, kwargs = substituted((args, kwargs), self.stand_ins)
        if _is_unrepeatable(func, kwargs) and not self.is_running():
            raise RuntimeError(
                f"{self.name}: forward calls {func.__name__} itself, which the backward cannot "
                "repeat; expected it inside a submodule"
            )
        return func(*args, **kwargs)


def _is_unrepeatable(func, kwargs) -> bool:
    return _kind_of(func) in ("draw", "norm") and kwargs.get("training") is not False


def check_equal(first, second) -> None:
    """Raise unless two runs of a transform returned the same bits, NaNs included."""
    for y, again in zip(tree_leaves(first), tree_leaves(second), strict=True):
        if isinstance(y, Tensor) and not ((y == again) | (y.isnan() & again.isnan())).all():
            difference = (y - again).abs().max().item()
            raise NotRepeatable(
                f"is not deterministic: two runs on one input differ by {difference:.3g}; expected "
                "the same bits (numbers from PyTorch's generators are repeated, others are not)"
            )


def _kind_of(func) -> str | None:
    """What is special about a torch function: "draw", "norm", "hidden norm", "count" or nothing."""
    try:
        return _kinds[func]
    except KeyError:
        if func in norms.FIRST:
            kind = "norm"
        elif func is Tensor.add_:
            kind = "count"
        elif getattr(func, "__name__", "") in norms.HIDDEN:
            kind = "hidden norm"
        else:
            kind = "draw" if is_draw(func) else None
        _kinds[func] = kind
        return kind


def first_opaque(run: Run, module: nn.Module, x: tuple):
    run.moved += running_statistics(run.parts)
    # A CUDA graph cannot hold states; without layers that drop, none is needed.
    if any(part.training for part in run.parts) and (not is_capturing() or _may_drop(run.parts)):
        run.events += [state_of(generator) for generator in _generators(x)]
    return module(*x)


def second_opaque(run: Run, module: nn.Module, x: tuple):
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
