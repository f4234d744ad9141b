"""What a training step must do at least, and what this machine can do: the roofline.

Counted are the convolutions and matrix products of a step with stored activations: their floating
point operations (2 a multiply-add), and as compulsory traffic each one's inputs and outputs, read
or written once. Norms, activations, additions and resampling count as fused into them, and to
compute again counts as no work: no provider reaches the roof, all of a network stand under it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from revbifpn_kernels.models.cost import fake_copy

from . import harness


class Work(NamedTuple):
    """Of one operator."""

    flop: int
    traffic: int  # bytes


class Peaks(NamedTuple):
    """Of this machine, measured: the fastest matrix product and copy."""

    flops: float  # a second
    bandwidth: float  # bytes read and written a second

    def roof_ms(self, work: list[Work]) -> float:
        """The least time for operators that run one after the other."""
        seconds = (max(w.flop / self.flops, w.traffic / self.bandwidth) for w in work)
        return 1e3 * sum(seconds)


def _convolution(x, weight, *_, out_val, **__) -> int:
    return 2 * out_val.numel() * weight[0].numel()


def _convolution_backward(grad, x, weight, *args, out_val, **__) -> int:
    """As much as the forward for each of the gradients of x and weight that is asked for.

    PyTorch's own formula counts the weights' gradient of grouped convolutions as if dense.
    """
    return 2 * grad.numel() * weight[0].numel() * sum(args[-1][:2])


def _depthwise_weight_grad(x, grad, kernel_size, *_, out_val, **__) -> int:
    return 2 * grad.numel() * kernel_size**2


def _depthwise_input_grad(grad, weight, *_, out_val, **__) -> int:
    return 2 * grad.numel() * weight[0].numel()


def _pointwise_conv(x, weight, *_, out_val, **__) -> int:
    return 2 * out_val.numel() * weight.shape[1]


def _pointwise_conv_backward(grad, x, weight, *_, out_val, **__) -> int:
    return 4 * grad.numel() * weight.shape[1]


FORMULAS = flop_registry | {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.revbifpn.depthwise_weight_grad: _depthwise_weight_grad,
    torch.ops.revbifpn.depthwise_input_grad: _depthwise_input_grad,
    torch.ops.revbifpn.pointwise_conv: _pointwise_conv,
    torch.ops.revbifpn.pointwise_conv_backward: _pointwise_conv_backward,
}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            leaves = tree_leaves((args, kwargs, result))
            traffic = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            self.work.append(Work(formula(*args, **kwargs, out_val=result), traffic))
        return result


def work_of(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    autocast: torch.dtype | None = None,
    training: bool = True,
) -> list[Work]:
    """The work of a training step, or of one evaluation, of a network that stores activations."""
    with FakeTensorMode() as fakes, torch.set_grad_enabled(training):
        twin = fake_copy(net, fakes).train(training)
        image = torch.empty(shape)
        with _Counter() as counter:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs = twin(image)
            if training:
                sum(y.sum() for y in tree_leaves(outputs)).backward()
    return counter.work


def measure_peaks(device: str, dtype: torch.dtype, clock) -> Peaks:
    """Time a large matrix product and a large copy in turns."""
    side, count = (8192, 2**30) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    precision = torch.get_float32_matmul_precision()
    # PyTorch lets convolutions use TF32 by default, and matrix products not.
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    for call in calls.values():
        call()
    times = harness.measure_interleaved(calls, clock, seconds=2.0, rounds=(5, 30))
    torch.set_float32_matmul_precision(precision)
    seconds = {name: timing.p20 / 1e3 for name, timing in times.items()}
    return Peaks(2 * side**3 / seconds["matmul"], 2 * source.nbytes / seconds["copy"])
