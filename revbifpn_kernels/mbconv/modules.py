"""MBConv, the transform F and G of RevBiFPN, and its parts."""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..reversible import recompute as replay
from ..reversible.recompute import quiet
from .drop_path import DropPath
from .fused import Stage, can_run, run_stages

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

    reads_slices = True  # gradients that are channels of larger maps need not be copied for it

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x)
        return super().forward(x) if plan is None else run_stages(*plan, x)

    def _plan(self, x: Tensor) -> tuple[list[Stage], bool] | None:
        """What runs fused, and whether the last norm is left to who reads the result; None where
        the modules must run. Decided in the first of two runs."""
        recorder = replay.recorder()
        return self._decide(x) if recorder is None else recorder.plan(lambda: self._decide(x))

    def _decide(self, x: Tensor) -> tuple[list[Stage], bool] | None:
        # In evaluation PyTorch's norms, without statistics to take, are as fast on CPUs: 0.9 of
        # the time (2-core EPYC, S0 and S2, 2026-11-24). Not by whether a graph is wanted, which
        # would let `inverse` round otherwise than the forward.
        # A run that nobody records is one that a block must refuse or hide, as modules let it.
        is_hidden = replay.recorder() is None and replay.is_replaying()
        may_run = self.training and not is_hidden and can_run(x)
        stages = _stages_of(self) if may_run else None
        if stages is None or not all(stage.fits(x) for stage in stages):
            return None
        # A subclass's forward expects maps.
        is_plain = type(self).forward is MBConv.forward and is_unwatched(self)
        return stages, is_plain and replay.may_leave_norm(self)


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
        conv = nn.Conv2d(
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


quiet.TYPES.update({MBConv, ConvNorm, SqueezeExcite, BatchNorm2d, DropPath})

_ORDER = ("expand", "depthwise", "squeeze_excite", "project", "drop_path")
_ACTS = {
    nn.Hardswish: "hardswish",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Identity: "identity",
}


def _stages_of(mbconv: MBConv) -> list[Stage] | None:
    """What `fused_mbconv` runs, or None where modules must: others than ours, or watched ones."""
    parts = mbconv._modules
    is_ours = tuple(name for name in _ORDER if name in parts) == tuple(parts)
    is_replica = getattr(mbconv, "_is_replica", False)  # DataParallel's hide their parameters
    if not is_ours or "project" not in parts or is_replica or nn_module._has_any_global_hook():
        return None
    if not all(is_unwatched(part) for part in parts.values()):
        return None
    convs = [parts[name] for name in ("expand", "depthwise", "project") if name in parts]
    if not all(_is_plain_conv_norm(part) for part in convs):
        return None
    stages = [_stage_of(part) for part in convs]
    if (gate := parts.get("squeeze_excite")) is not None:
        if not _is_plain_squeeze_excite(gate):
            return None
        squeeze = gate._modules["reduce"], gate._modules["expand"]
        stages[-2] = stages[-2]._replace(squeeze=squeeze, squeeze_act=_act_of(gate))
    if (drop := parts.get("drop_path")) is not None:
        if type(drop) is not DropPath:
            return None
        stages[-1] = stages[-1]._replace(drop_path=drop.probability if drop.training else 0.0)
    return stages


def _stage_of(part: ConvNorm) -> Stage:
    norm = part._modules["norm"]
    return Stage(part._modules["conv"], norm, norm.training, _act_of(part))


# Entries of `_modules` and `_parameters` are read at once, attributes of modules by a slow search.
def _act_of(part: nn.Module) -> str:
    act = part._modules.get("act")
    return "identity" if act is None else _ACTS[type(act)]


def _has_plain_parts(part: nn.Module, kind: type) -> bool:
    inner = part._modules
    return (
        type(part) is kind
        and all(map(is_unwatched, inner.values()))
        and ("act" not in inner or type(inner["act"]) in _ACTS)
    )


def _is_plain_conv_norm(part: nn.Module) -> bool:
    if not _has_plain_parts(part, ConvNorm) or not part._modules.keys() <= {"conv", "norm", "act"}:
        return False
    conv, norm = part._modules["conv"], part._modules["norm"]
    return (
        type(conv) is nn.Conv2d
        and type(norm) in (BatchNorm2d, nn.BatchNorm2d)
        and _has_entries(conv, norm)
        and conv._parameters["bias"] is None
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(sides)) == 1 for sides in (conv.kernel_size, conv.stride, conv.padding))
        and norm.track_running_stats
        and norm.momentum is not None
    )


def _is_plain_squeeze_excite(part: nn.Module) -> bool:
    if not _has_plain_parts(part, SqueezeExcite):
        return False
    convs = part._modules["reduce"], part._modules["expand"]
    return all(
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and _has_entries(conv)
        and conv._parameters["bias"] is not None
        for conv in convs
    )


def _has_entries(*parts: nn.Module) -> bool:
    """Whether weight and bias are where modules keep them: FSDP and users put attributes there."""
    return all({"weight", "bias"} <= part._parameters.keys() for part in parts)


def is_unwatched(part: nn.Module) -> bool:
    """Whether nobody asked to see the module's calls, by hooks or a forward of his own."""
    return not (
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or part._compiled_call_impl
        or "forward" in part.__dict__
    )
