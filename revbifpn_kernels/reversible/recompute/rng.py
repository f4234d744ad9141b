"""Random numbers: the second run of a transform sees those of the first.

Small results, such as a mask per sample, are kept themselves: repeating them touches no generator,
so a CUDA graph can hold it. Before a large draw the state of its generator is kept instead.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 4096  # elements; the state of the CPU's generator takes as much memory as 1264 floats

# Python functions of torch.nn.functional, whose calls inside are not seen one by one.
_DRAWING_FUNCTIONS = {
    F.alpha_dropout,
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.feature_alpha_dropout,
    F.fractional_max_pool2d,
    F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d,
    F.fractional_max_pool3d_with_indices,
    F.gumbel_softmax,
    F.multi_head_attention_forward,
    F.rrelu,
}
_FILLS = frozenset(
    "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_".split()
)
_FACTORIES = frozenset(
    "bernoulli binomial multinomial normal poisson rand rand_like randint randint_like randn "
    "randn_like randperm".split()
)


class NotRepeatable(RuntimeError):
    """The second run of a transform differs from its first, or could not repeat it."""


class Kept(NamedTuple):
    """The numbers that were drawn."""

    value: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield self.value


class State(NamedTuple):
    """The generator's state before a draw."""

    generator: torch.Generator
    state: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield self.state


def is_draw(func) -> bool:
    """Whether `func`, a torch function or method, may advance a random generator."""
    if func in _DRAWING_FUNCTIONS:
        return True
    tag = torch.Tag.nondeterministic_seeded
    if isinstance(func, torch._ops.OpOverload):
        return tag in func.tags
    packet = getattr(torch.ops.aten, getattr(func, "__name__", ""), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(tag in getattr(packet, name).tags for name in packet.overloads())


def draw_and_keep(events: list, func, args, kwargs):
    """Call `func` and append to `events` what repeats its draw."""
    if _draws_nothing(kwargs):
        return func(*args, **kwargs)
    name = func.__name__
    if name in _FILLS and args and args[0].numel() <= SMALL:
        result = func(*args, **kwargs)
        events.append(Kept(result.clone()))
        return result
    if name in _FACTORIES and is_capturing():
        result = func(*args, **kwargs)
        events.append(Kept(result.clone()))
        return result
    state = state_of(_generator_of(args, kwargs))
    result = func(*args, **kwargs)
    is_kept = name in _FACTORIES and result.numel() <= SMALL
    events.append(Kept(result.clone()) if is_kept else state)
    return result


def draw_again(events: Iterator, func, args, kwargs):
    """Call `func` so that it returns what it returned when `draw_and_keep` called it."""
    if _draws_nothing(kwargs):
        return func(*args, **kwargs)
    drawn = next(events, None)
    if isinstance(drawn, Kept):
        if func.__name__ in _FILLS:
            return args[0].copy_(drawn.value)
        return drawn.value.clone()
    if not isinstance(drawn, State):
        raise NotRepeatable(f"called {func.__name__}, which it did not call there in its first run")
    now = drawn.generator.get_state()
    drawn.generator.set_state(drawn.state)
    try:
        return func(*args, **kwargs)
    finally:
        drawn.generator.set_state(now)


def state_of(generator: torch.Generator) -> State:
    if is_capturing() and generator.device.type == "cuda":
        raise NotRepeatable(
            f"draws more than {SMALL} random numbers, whose generator's state cannot be kept in a "
            "CUDA graph; drop samples or channels instead of elements, or set reversible=False"
        )
    return State(generator, generator.get_state())


def generator_on(device: torch.device) -> torch.Generator:
    """The default generator of `device`."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]


def _draws_nothing(kwargs) -> bool:
    """Whether the call is switched off: modules pass these by name to torch.nn.functional."""
    return kwargs.get("training") is False or kwargs.get("dropout_p") == 0.0


def _generator_of(args, kwargs) -> torch.Generator:
    if kwargs.get("generator") is not None:
        return kwargs["generator"]
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            return generator_on(argument.device)
    return generator_on(torch.device(kwargs.get("device") or torch.get_default_device()))


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
