"""Counts the operators of a call, and the multiply-adds of a network."""

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from revbifpn_kernels.models.cost import fake_copy


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object], device: str) -> int:
    """Kernels that a call launches on a GPU; on a CPU, operators that compute or copy."""
    if device == "cpu":
        with _Counter() as counter:
            call()
        return counter.count
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    return sum(e.count for e in profiler.key_averages() if "LaunchKernel" in e.key)


def gmacs(net: nn.Module, side: int) -> float:
    """Multiply-adds of convolutions and matrix products, of an evaluation of one image, in 10⁹."""
    with FakeTensorMode() as fakes, torch.no_grad():
        twin = fake_copy(net, fakes).eval()
        with FlopCounterMode(display=False) as counter:
            twin(torch.empty(1, 3, side, side))
    return counter.get_total_flops() / 2e9
