"""The parts of MBConv: convolution with norm and activation, squeeze-excite, batch norm."""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..reversible import recompute

NormLayer = Callable[[int], nn.Module]  # called with the number of channels
ActLayer = Callable[[], nn.Module]  # called without arguments


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, which records for the recompute itself."""

    records_itself = True

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        self._check_input_dim(x)
        recompute.call(Tensor.add_, self.num_batches_tracked, 1)
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        return recompute.call(
            F.batch_norm, x, *running, self.weight, self.bias, True, momentum, self.eps
        )


NORM_LAYER: NormLayer = functools.partial(BatchNorm2d, eps=1e-3)


class ConvNorm(nn.Sequential):
    """Convolution without bias → norm [→ activation]; keeps the sides at stride 1."""

    records_itself = True

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
        padding = (kernel_size - 1) // 2
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        parts: dict[str, nn.Module] = {"conv": conv, "norm": norm_layer(out_channels)}
        if act_layer is not None:
            parts["act"] = act_layer()
        super().__init__(OrderedDict(parts))


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate computed from the means of all channels."""

    records_itself = True

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
