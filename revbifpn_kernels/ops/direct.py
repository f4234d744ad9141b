"""Calls ops without PyTorch's dispatcher, which takes several µs per call.

An op is called directly only where the dispatcher would do nothing else than run its kernel: on
plain tensors, where no gradient is wanted and no mode, transform, tracer or profiler is active.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import DispatchKey, DispatchKeySet, _is_torch_function_mode_enabled
from torch.autograd import _profiler_enabled, forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from .library import library
from .recorded import Recorded, picker

try:  # how torch.compile checks that its compiled code fits; a private interface
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

# By op, options, counts of tensors and the first one's elements: entries (fits, run), the latest
# first. `fits(*tensors)` tells whether tensors are like those of an earlier call, `run(tensors)`
# computes. Entries of `direct_op` end with (pick, absent). Tuples, because threads share them.
known: dict[tuple, tuple[tuple, ...]] = {}
MOST, MOST_GEOMETRIES = 4096, 16  # keys, and entries per key


def _keys(*names: str) -> DispatchKeySet:
    keys = DispatchKeySet(DispatchKey.Undefined)
    for name in names:
        keys |= DispatchKeySet(getattr(DispatchKey, name))
    return keys


_PLAIN_TENSOR = _keys(
    *(f"{functionality}{device}" for functionality in ("", "Autograd", "Autocast")
      for device in ("CPU", "CUDA")),
    "ADInplaceOrView",
)  # fmt: skip
_PLAIN_TYPES = Tensor, nn.Parameter  # TensorGuards tells types apart, so no subclass fits later
_CPU = _keys("CPU")
_PLAIN_THREAD = _keys("BackendSelect", "ADInplaceOrView")


def _holds_only(keys: DispatchKeySet, allowed: DispatchKeySet) -> bool:
    return (keys | allowed).raw_repr() == allowed.raw_repr()


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would only find the kernel of the tensors' device."""
    wants_grad = is_grad_enabled() and any(t.requires_grad for t in tensors)
    return (
        not wants_grad
        and all(type(t) in _PLAIN_TYPES for t in tensors)
        and _holds_only(torch._C._dispatch_tls_local_include_set(), _PLAIN_THREAD)
        and all(_holds_only(torch._C._dispatch_keys(t), _PLAIN_TENSOR) for t in tensors)
    )


def is_on_cpu(device: torch.device) -> bool:
    """Whether a C++ kernel computes there."""
    return device.type == "cpu"


def _is_watched() -> bool:
    """Whether a compiler, function mode, profiler or forward-mode differentiation must see calls.

    Tensors do not show this.
    """
    return (
        is_compiling()
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _places_of_tensors(values: Iterable[Any]) -> dict[int, int | slice]:
    """Map the place of each argument with tensors to its index among all, for lists to a slice."""
    places: dict[int, int | slice] = {}
    count = 0
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places[place] = count
            count += 1
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            places[place] = slice(count, count + len(value))
            count += len(value)
    return places


def _overload(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.revbifpn, op).default


def _written(kernel: torch._ops.OpOverload) -> list[int]:
    """The places of the arguments that an op writes to."""
    arguments = kernel._schema.arguments
    return [k for k, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]


def _runner(op: str, on_gpu: Callable, arguments: tuple, device: torch.device) -> Callable:
    """A function of tensors that runs the op without the dispatcher; other arguments as here."""
    places = _places_of_tensors(arguments)
    frame = [None if place in places else value for place, value in enumerate(arguments)]
    kernel = _overload(op)
    written = [places[place] for place in _written(kernel) if place in places]

    def given(tensors: tuple) -> list:
        others = frame.copy()
        for place, which in places.items():
            others[place] = tensors[which]
        return others

    def on_cpu(tensors: tuple) -> Any:
        return kernel.redispatch(_CPU, *given(tensors))

    run = on_cpu if is_on_cpu(device) else Recorded(on_gpu, given, device)

    def run_and_count(tensors: tuple) -> Any:
        results = run(tensors)
        increment_version([tensors[which] for which in written])
        return results

    return run_and_count if written else run


def _add(
    key: tuple, op: str, on_gpu: Callable, arguments: tuple, tensors: Sequence[Tensor], *more: Any
) -> None:
    """Prepare for calls like this one, which nothing watches, if they need no dispatcher."""
    if TensorGuards is None or not tensors or not _is_plain(tensors):
        return
    sides, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guard = TensorGuards(*tensors, dynamic_dims_sizes=sides, dynamic_dims_strides=strides)
    if not guard.check(*tensors):  # for example if one tensor is given twice
        return
    if len(known) >= MOST:
        known.clear()
    run = _runner(op, on_gpu, arguments, tensors[0].device)
    others = known.get(key, ())[: MOST_GEOMETRIES - 1]
    known[key] = (guard.check, run, *more), *others


class DirectCalls:
    """Runs an op on lists of tensors like those of earlier calls, whose arguments it has checked.

    On a GPU by `on_gpu`, the op's implementation there. Tensors are like earlier ones if types,
    devices, dtypes, sizes and strides are the same. Options are compared by `==`, not by type:
    after a call with lattice=1.0, lattice=True is no longer refused and means the same.
    """

    def __init__(self, op: str, on_gpu: Callable) -> None:
        self.op, self.on_gpu = op, on_gpu

    def __call__(
        self,
        options: tuple,
        maps: tuple,
        sources: Sequence[Tensor] = (),
        scales: Sequence[Tensor] | None = None,
        shifts: Sequence[Tensor] | None = None,
    ) -> Any:
        """What the op returns, or NotImplemented where it has to be called by the dispatcher.

        Arguments may be wrong in any way: such calls have never been added.
        """
        if _is_watched():
            return NotImplemented
        try:
            key, tensors = _split(self.op, options, maps, sources, scales, shifts)
            entries = known.get(key, ())
        except (AttributeError, TypeError):  # no tensors or lists; options that cannot be hashed
            return NotImplemented
        for fits, run in entries:
            if fits(*tensors):
                return run(tensors)
        return NotImplemented

    def add(self, arguments: tuple, options: tuple, *tensors: Any) -> None:
        """Prepare for calls like this one, whose arguments have been checked.

        `arguments` are all of the op's; the others are as in a call.
        """
        if _is_watched():
            return
        try:
            key, tensors = _split(self.op, options, *tensors)
            hash(key)
        except (AttributeError, TypeError):  # such as a list of lists
            return
        _add(key, self.op, self.on_gpu, arguments, tensors)


def _split(
    op: str, options: tuple, maps: tuple, sources=(), scales=None, shifts=None
) -> tuple[tuple, tuple]:
    """What calls have in common that differ in nothing but tensors, and the tensors.

    Raises AttributeError or TypeError where these are no tensors or no lists of them.
    """
    first, grad = maps[0].numel(), is_grad_enabled()
    if not isinstance(sources, (list, tuple)):
        raise TypeError
    if scales is shifts is None:
        return (op, first, grad, options, len(sources)), (*maps, *sources)
    if not (isinstance(scales, (list, tuple)) and isinstance(shifts, (list, tuple))):
        raise TypeError
    counts = len(sources), len(scales), len(shifts)
    return (op, first, grad, options, counts), (*maps, *sources, *scales, *shifts)


def direct_op(op: str, on_gpu: Callable) -> Callable:
    """A function that calls an op whose arguments are tensors, None and options.

    Calls on tensors unlike all earlier ones go by the dispatcher, whose kernel checks them.
    """
    kernel = _overload(op)
    if _written(kernel):
        library.impl(op, functools.partial(_run_and_count, kernel), "ADInplaceOrView")
    kinds = [str(argument.type) for argument in kernel._schema.arguments]
    options_of = picker([k for k, kind in enumerate(kinds) if "Tensor" not in kind])

    def call(*arguments: Any) -> Any:
        if _is_watched():
            return kernel(*arguments)
        try:
            first, grad = arguments[0].numel(), is_grad_enabled()
            key = op, first, grad, options_of(arguments), len(arguments)
            entries = known.get(key, ())
        except (AttributeError, IndexError, TypeError):  # which the dispatcher refuses
            return kernel(*arguments)
        for fits, run, pick, absent in entries:
            tensors = pick(arguments)
            if fits(*tensors):
                for place in absent:
                    if arguments[place] is not None:
                        break
                else:
                    return run(tensors)
        results = kernel(*arguments)
        present = [k for k, value in enumerate(arguments) if isinstance(value, Tensor)]
        absent = [k for k, value in enumerate(arguments) if value is None]
        pick = picker(present)
        _add(key, op, on_gpu, arguments, pick(arguments), pick, absent)
        return results

    return call


def _run_and_count(kernel: torch._ops.OpOverload, *arguments: Any) -> Any:
    """Run an op that writes to arguments, and count that in their versions."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        results = kernel(*arguments)
    written = (arguments[place] for place in _written(kernel))
    increment_version([tensor for tensor in written if tensor is not None])
    return results
