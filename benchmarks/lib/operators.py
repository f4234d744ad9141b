"""Counts and times the operators of a call, by kind."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPIN_CYCLES = 100_000  # of a GPU, about 60 µs: longer than a launch, so that launches do not show


def launches(call: Callable[[], object], device: str) -> int:
    """Kernels that a call launches on a GPU; on a CPU, operators that compute or copy."""
    if device == "cpu":
        return operators(call).total()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    return sum(e.count for e in profiler.key_averages() if "LaunchKernel" in e.key)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> Counter[str]:
    """Operator calls that compute or copy: about the launches on a GPU."""
    with _Operators() as counter:
        call()
    return counter.counts


class OperatorTimes(TorchDispatchMode):
    """Times each operator by its kind, and by the level of the largest map that it touches.

    On a CPU in processor time of the calling thread, so let PyTorch have one thread.

    Args:
        batch, side: Of the images; a quarter of the side is level 0, each further level half.

    Attributes:
        kinds, levels: Milliseconds and calls, each a list of one entry a call.
    """

    def __init__(self, batch: int, side: int, device: str) -> None:
        super().__init__()
        self.batch, self.side, self.device = batch, side, device
        self.kinds: dict[str, list[float]] = defaultdict(list)
        self.levels: dict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        result, ms = self._timed(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        name = func._overloadpacket.__name__
        self.kinds[kind_of(name, args, tensors, self.batch)].append(ms)
        self.levels[level_of(tensors, self.batch, self.side)].append(ms)
        return result

    def _timed(self, func, args, kwargs):
        if self.device == "cpu":
            start = time.thread_time()  # other jobs on this machine do not count
            result = func(*args, **kwargs)
            return result, (time.thread_time() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)  # the host gets ahead
        start.record()
        result = func(*args, **kwargs)
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end)


COARSEST = 3
OURS = {  # by the starts of names
    "depthwise": "convolution, depthwise",
    "pointwise": "convolution, 1×1",
    "batch_statistics": "batch norm, activation, gate",  # fused
    "norm_act": "batch norm, activation, gate",
    "norm_factors": "batch norm, activation, gate",
    "squeeze_excite": "squeeze-excite, classifier",
    "resample": "resample",
}
ACTIVATIONS = ("hardswish", "silu", "relu", "threshold", "sigmoid", "hardsigmoid", "gelu")


def kind_of(name: str, args: tuple, tensors: list[Tensor], batch: int) -> str:
    """The row of the profile that an operator belongs to."""
    for start, kind in OURS.items():
        if name.startswith(start):
            return kind
    if _is_gate(tensors, batch):
        return "squeeze-excite, classifier"
    if "convolution" in name:
        return _kind_of_convolution(name, args)
    if "batch_norm" in name:
        return "batch norm"
    if any(activation in name for activation in ACTIVATIONS):
        return "activation"
    if "upsample" in name:
        return "resample"
    return "additions, copies, other"


def _is_gate(tensors: list[Tensor], batch: int) -> bool:
    """Whether an operator computes, applies or differentiates one number a sample and channel."""
    return any(
        (t.dim() == 4 and t.shape[0] == batch and t.shape[2:] == (1, 1))
        or (t.dim() == 2 and t.shape[0] == batch)
        for t in tensors
    )


def _kind_of_convolution(name: str, args: tuple) -> str:
    weight = args[2] if "backward" in name else args[1]
    if weight.shape[1] == 1:
        return "convolution, depthwise"
    is_pointwise = weight.shape[2:] == (1, 1)
    return "convolution, 1×1" if is_pointwise else "convolution, dense"


def level_of(tensors: list[Tensor], batch: int, side: int) -> str:
    """By the height of the largest map; "none" for what works on weights, statistics, gates."""
    height = max((_height(t, batch) for t in tensors), default=1)
    if height <= 1:
        return "none"
    level = 0
    while height * (8 << level) <= side:
        level += 1
    return f"level {level}" if level <= COARSEST else "none"


def _height(tensor: Tensor, batch: int) -> int:
    """Of a batch of square maps, also as a matrix with a row a pixel; else 1."""
    if tensor.dim() == 4 and tensor.shape[0] == batch:
        return tensor.shape[2]
    if tensor.dim() == 2 and tensor.shape[0] % batch == 0:
        height = math.isqrt(tensor.shape[0] // batch)
        return height if batch * height**2 == tensor.shape[0] else 1
    return 1
