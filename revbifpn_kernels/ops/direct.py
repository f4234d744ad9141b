"""Calls of ops that go around PyTorch's dispatcher, whose Python takes several µs per op.

An op is called directly only where the dispatcher would do nothing else than run its kernel: on
plain tensors, where no gradient is wanted and no mode, transform, tracer or profiler is active.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _is_torch_function_mode_enabled
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling

from .compiled import places_of_tensors

try:  # how torch.compile checks that its compiled code fits; a private interface
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

# By op, options and counts of tensors: what checks whether given tensors fit, and what then runs.
known: dict[tuple, list[tuple[Callable, Callable]]] = {}
MOST = 4096  # keys, of which each has an entry per geometry


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
_CPU = _keys("CPU")
_PLAIN_THREAD = _keys("BackendSelect", "ADInplaceOrView")


def _holds_only(keys: DispatchKeySet, allowed: DispatchKeySet) -> bool:
    return (keys | allowed).raw_repr() == allowed.raw_repr()


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would only find the kernel of the tensors' device."""
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return (
        not wants_grad
        and _holds_only(torch._C._dispatch_tls_local_include_set(), _PLAIN_THREAD)
        and all(_holds_only(torch._C._dispatch_keys(t), _PLAIN_TENSOR) for t in tensors)
    )


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a C++ kernel computes for it."""
    return tensor.is_cpu


def _is_watched() -> bool:
    """Whether something follows the calls of Python's functions, of which no tensor knows."""
    return (
        is_compiling()
        or _is_torch_function_mode_enabled()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


class DirectCalls:
    """Runs an op on tensors like those of earlier calls, whose arguments it has checked.

    `prepare` takes an op's arguments on a GPU. It returns a function of all their tensors, which is
    then called with others of the same devices, dtypes, sizes and strides.
    """

    def __init__(self, op: str, prepare: Callable[..., Callable[[tuple], Any]]) -> None:
        self.op, self.prepare = op, prepare

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
        except TypeError:  # no lists, or options that cannot be hashed
            return NotImplemented
        for fits, run in entries:
            if fits(*tensors):
                return run(tensors)
        return NotImplemented

    def add(
        self, arguments: tuple, options: tuple, maps: tuple, sources=(), scales=None, shifts=None
    ) -> None:
        """Prepare for calls like this one, if they may go around the dispatcher.

        `arguments` are all of the op's; the others are as in a call.
        """
        if TensorGuards is None or _is_watched():
            return
        try:
            key, tensors = _split(self.op, options, maps, sources, scales, shifts)
            hash(key)
        except TypeError:  # such as a list of lists
            return
        if not _is_plain(tensors):
            return
        sides, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guard = TensorGuards(*tensors, dynamic_dims_sizes=sides, dynamic_dims_strides=strides)
        if not guard.check(*tensors):  # as where a tensor is given twice
            return
        if len(known) >= MOST:
            known.clear()
        run = _of_cpu(self.op, arguments) if is_on_cpu(tensors[0]) else self.prepare(*arguments)
        known.setdefault(key, []).append((guard.check, run))


def _split(op: str, options: tuple, maps: tuple, sources, scales, shifts) -> tuple[tuple, tuple]:
    """What calls have in common that differ in nothing but tensors, and the tensors."""
    grad = torch.is_grad_enabled()
    if scales is shifts is None:
        return (op, grad, options, len(sources)), (*maps, *sources)
    counts = len(sources), len(scales), len(shifts)
    return (op, grad, options, counts), (*maps, *sources, *scales, *shifts)


def _of_cpu(op: str, arguments: tuple) -> Callable[[tuple], Any]:
    """The C++ kernel of an op, for other tensors in the places of those among the arguments."""
    kernel = getattr(torch.ops.revbifpn, op).default.redispatch
    places = list(places_of_tensors(arguments).items())
    frame = [None if place in dict(places) else value for place, value in enumerate(arguments)]

    def run(tensors: tuple) -> Any:
        given = frame.copy()
        for place, which in places:
            given[place] = tensors[which]
        return kernel(_CPU, *given)

    return run
