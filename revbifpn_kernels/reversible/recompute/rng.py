"""Random numbers: the recompute of a transform uses those of the forward.

Small results, such as a mask per sample, are saved themselves: repeating them touches no generator,
so a CUDA graph can contain it. Before a large draw the state of its generator is saved instead.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import NotRepeatable

SMALL = 4096  # elements; the state of the CPU's generator takes as much memory as 1264 floats

# Functions of torch.nn.functional that draw; the draws inside them are not seen one by one.
_DRAWING_FUNCTIONS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices),
    *(F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices),
    *(F.gumbel_softmax, F.multi_head_attention_forward, F.rrelu),
}
_FILLS = frozenset(
    "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_".split()
)
_FACTORIES = frozenset(
    "bernoulli binomial multinomial normal poisson rand rand_like randint randint_like randn "
    "randn_like randperm".split()
)
_thread = threading.local()


class SavedGenerator(NamedTuple):
    """A generator and its state before a draw."""

    generator: torch.Generator
    state: Tensor


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


def draw_and_save(events: list, func, args, kwargs):
    """Call `func`; append to `events` the numbers it drew, or their generator with its state."""
    if _draws_nothing(kwargs):
        return func(*args, **kwargs)
    name = func.__name__
    is_small = name in _FILLS and args and args[0].numel() <= SMALL
    event = None
    if not is_small and not (name in _FACTORIES and is_capturing()):
        event = saved_generator(_generator_of(args, kwargs))
    result = func(*args, **kwargs)
    if event is None or (name in _FACTORIES and result.numel() <= SMALL):
        event = result.clone()
    events.append(event)
    return result


def repeat_draw(events: Iterator, func, args, kwargs):
    """Call `func` so that it returns what it returned when `draw_and_save` called it."""
    if _draws_nothing(kwargs):
        return func(*args, **kwargs)
    event = next(events, None)
    if isinstance(event, Tensor):
        return args[0].copy_(event) if func.__name__ in _FILLS else event.clone()
    if not isinstance(event, SavedGenerator):
        raise NotRepeatable(f"called {func.__name__}, which it did not call there in the forward")
    with rewound([event]):
        return func(*args, **kwargs)


@contextlib.contextmanager
def rewound(saved: Sequence[SavedGenerator]) -> Iterator[None]:
    """Set the generators to their saved states, and back afterwards."""
    now = [generator.get_state() for generator, _ in saved]
    for generator, state in saved:
        generator.set_state(state)
    try:
        yield
    finally:
        for (generator, _), state in zip(saved, now, strict=True):
            generator.set_state(state)


def saved_generator(generator: torch.Generator) -> SavedGenerator:
    if is_capturing() and generator.device.type == "cuda":
        raise NotRepeatable(
            "draws random numbers whose generator's state cannot be saved in a CUDA graph: more "
            f"than {SMALL} at once, or in a layer such as nn.Dropout2d; replace it by "
            "revbifpn_kernels.mbconv.drop_path.DropPath, or set reversible=False"
        )
    return SavedGenerator(generator, generator.get_state())


def generator_on(device: torch.device) -> torch.Generator:
    """The default generator of `device`."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]


def _draws_nothing(kwargs) -> bool:
    """Whether dropout is off: modules pass these arguments to torch.nn.functional by name."""
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


@contextlib.contextmanager
def sharing_draws(block: nn.Module) -> Iterator[None]:
    """Let the transforms of one call of `block` share draws, see `shared_draws`."""
    outer = shared_draws()
    _thread.shared = block, {}
    try:
        yield
    finally:
        _thread.shared = outer


def shared_draws() -> tuple[nn.Module, dict] | None:
    """The block that this thread runs, and the numbers drawn at once for all its transforms."""
    return getattr(_thread, "shared", None)
