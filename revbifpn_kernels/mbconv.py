"""MBConv, the transform F and G of RevBiFPN, and its parts."""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import replay
from .ops.depthwise_weight_grad import depthwise_weight_grad
from .replay import quiet

# Given the number of channels; given nothing.
NormLayer = Callable[[int], nn.Module]
ActLayer = Callable[[], nn.Module]


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, which a second run need not watch."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        self._check_input_dim(x)
        replay.call(Tensor.add_, self.num_batches_tracked, 1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        return replay.call(
            F.batch_norm,
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            True,
            momentum,
            self.eps,
        )


NORM_LAYER: NormLayer = functools.partial(BatchNorm2d, eps=1e-3)


class MBConv(nn.Sequential):
    """The transform F and G of RevBiFPN: [expand →] depthwise → [squeeze-excite →] project.

    Returns (N, out_channels, ⌈H/stride⌉, ⌈W/stride⌉) from (N, in_channels, H, W). Convolutions
    before a norm have no bias; no activation follows the last norm, no input is added.

    Args:
        kernel_size: Of the depthwise convolution; odd.
        expand_ratio: Channels of the depthwise convolution over in_channels; 1 leaves out expand.
        se_ratio: Hidden channels of squeeze-excite over in_channels; 0 leaves it out.
        drop_path: Probability that a sample's result is dropped in training (stochastic depth).
        norm_layer: Called with the channels; batch norm with eps 1e-3 unless given.
        act_layer: Called without arguments, also in squeeze-excite.

    Raises:
        ValueError: An even kernel, a stride below 1, a ratio or a probability out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        expand_ratio: float = 1.0,
        se_ratio: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = NORM_LAYER,
        act_layer: ActLayer = nn.Hardswish,
    ) -> None:
        _check_mbconv(kernel_size, stride, expand_ratio, se_ratio, drop_path)
        width = int(in_channels * expand_ratio)
        conv_norm = functools.partial(ConvNorm, norm_layer=norm_layer)
        parts: dict[str, nn.Module] = {}
        if expand_ratio != 1:
            parts["expand"] = conv_norm(in_channels, width, 1, act_layer=act_layer)
        parts["depthwise"] = conv_norm(
            width, width, kernel_size, stride, groups=width, act_layer=act_layer
        )
        if se_ratio > 0:
            hidden = max(1, int(in_channels * se_ratio))
            parts["squeeze_excite"] = SqueezeExcite(width, hidden, act_layer)
        parts["project"] = conv_norm(width, out_channels, 1)
        if drop_path > 0:
            parts["drop_path"] = DropPath(drop_path)
        super().__init__(OrderedDict(parts))


class ConvNorm(nn.Sequential):
    """Convolution without bias → norm [→ activation]; sides are kept at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        norm_layer: NormLayer = NORM_LAYER,
        act_layer: ActLayer | None = None,
    ) -> None:
        is_pointwise = kernel_size == stride == groups == 1
        conv = (PointwiseConv2d if is_pointwise else DepthwiseConv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            (kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        parts: dict[str, nn.Module] = {"conv": conv, "norm": norm_layer(out_channels)}
        if act_layer is not None:
            parts["act"] = act_layer()
        super().__init__(OrderedDict(parts))


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution, on a CPU's channels_last maps a matrix product, which is faster there.

    Forward and backward of 24 to 320 channels take 0.35 to 0.8 times as long on 2 threads of a
    2-core Xeon, 0.7 to 1.15 on one (torch 2.12, batch 4, 2026-11-24).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or x.stride(1) != 1:
            return super().forward(x)
        # Dense, as convolutions make it: how a product rounds depends on the strides, and exact
        # mode needs the same bits of a stream's half as of a map of its own.
        x = x.contiguous(memory_format=torch.channels_last)
        pixels = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return pixels.permute(0, 3, 1, 2)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution; on CPUs its weights' gradient is `depthwise_weight_grad`."""

    def forward(self, x: Tensor) -> Tensor:
        # Of 3×3 kernels PyTorch's own gradient is as fast.
        is_slow = self.kernel_size[0] > 3 and x.is_cpu and x.stride(1) == 1
        if not is_slow or not self._is_trained_plainly():
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.stride[0], self.padding[0])

    def _is_trained_plainly(self) -> bool:
        is_traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled() and self.weight.requires_grad and not is_traced


class _Depthwise(torch.autograd.Function):
    """F.conv2d(x, weight, None, stride, padding, groups=C) with our gradient of the weight."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        is_ours = needs_weight and not torch.is_grad_enabled()  # PyTorch's differentiates again
        sides = [stride] * 2, [padding] * 2, [1] * 2
        mask = [needs_x, needs_weight and not is_ours, False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *sides, False, [0, 0], len(weight), mask
        )
        if is_ours:
            grad_weight = depthwise_weight_grad(
                x, grad, kernel_size=weight.shape[-1], stride=stride, padding=padding
            )
        return grad_x, grad_weight, None, None


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, hidden: int, act_layer: ActLayer = nn.Hardswish) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = act_layer()
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Matrix products: a convolution of one pixel costs several times as much to set up.
        means = x.mean((2, 3))
        hidden = self.act(F.linear(means, self.reduce.weight.flatten(1), self.reduce.bias))
        gates = F.linear(hidden, self.expand.weight.flatten(1), self.expand.bias)
        return x * F.hardsigmoid(gates)[:, :, None, None]


class DropPath(nn.Module):
    """Stochastic depth: in training drops whole samples, and scales up the others."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"DropPath: probability must lie in [0, 1), got {probability}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = replay.call(Tensor.bernoulli_, x.new_empty(x.shape[0], 1, 1, 1), keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"{self.probability}"


def _check_mbconv(kernel_size, stride, expand_ratio, se_ratio, drop_path) -> None:
    for name, value, is_right, wanted in (
        ("kernel_size", kernel_size, kernel_size % 2 == 1 and kernel_size > 0, "odd"),
        ("stride", stride, stride >= 1, "at least 1"),
        ("expand_ratio", expand_ratio, expand_ratio > 0, "positive"),
        ("se_ratio", se_ratio, 0 <= se_ratio <= 1, "in [0, 1]"),
        ("drop_path", drop_path, 0 <= drop_path < 1, "in [0, 1)"),
    ):
        if not is_right:
            raise ValueError(f"MBConv: {name} must be {wanted}, got {value}")


quiet.TYPES.update({MBConv, ConvNorm, PointwiseConv2d, DepthwiseConv2d, SqueezeExcite})
quiet.TYPES.update({BatchNorm2d, DropPath})
