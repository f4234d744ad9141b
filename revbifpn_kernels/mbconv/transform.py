"""MBConv, the transform F and G of RevBiFPN."""

import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..ops.resample.folded_norm import Source
from ..reversible import Pullback, recompute
from .convolutions import are_slow
from .drop_path import DropPath
from .fused import rerun_stages, run_stages
from .in_graph import run_in_graph, stages_for_graph
from .modules import NORM_LAYER, ActLayer, ConvNorm, NormLayer, SqueezeExcite
from .stages import Stage, can_run, fit, is_autocast, is_unwatched, stages_of


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

    records_itself = True
    reads_slices = True  # its backward accepts channel slices as gradients

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

    def forward(self, x: Tensor) -> Tensor:
        stages = recompute.decide(self._stages, x)
        return super().forward(x) if stages is None else _run(stages, x)

    def forward_folded(self, x: Tensor) -> Source:
        """Return the result, its last norm left to the fusion that reads it.

        With hooks, a replaced `forward` or a subclass's own `forward` this is `self(x)`.
        """
        stages = recompute.decide(self._stages_to_fold, x)
        return self(x) if stages is None else _run(stages, x, folds_norm=True)

    def rerun_folded(self, x: Tensor) -> Source | Pullback:
        """Return what `forward_folded` returned in the forward, without a graph where it can."""
        stages = recompute.decide(self._stages_to_fold, x)
        return self(x) if stages is None else rerun_stages(stages, x)

    def _stages_to_fold(self, x: Tensor) -> list[Stage] | None:
        is_plain = type(self).forward is MBConv.forward and is_unwatched(self)
        return self._stages(x) if is_plain else None

    def _stages(self, x: Tensor) -> list[Stage] | None:
        """What runs fused, or None where the modules must run one by one."""
        if torch.compiler.is_compiling():
            return stages_for_graph(self, x)
        # In a traced block, but outside a transform, modules run, so that GuardMode refuses them.
        is_hidden = recompute.current_recorder() is None and recompute.is_traced()
        stages = stages_of(self) if not is_hidden and can_run(x) and self._is_faster(x) else None
        return stages if stages and fit(stages, x) else None

    def _is_faster(self, x: Tensor) -> bool:
        """Whether fused stages are faster than the modules.

        Always in training. In evaluation only where half precision is slow: else the modules take
        0.9 of the time (CPU: 2-core EPYC, S0 and S2, 2026-11-24). Grad mode must not decide:
        `inverse` has to round like the forward.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if is_autocast(x) else x.dtype
        return self.training or are_slow(device, dtype)


def _run(stages: list[Stage], x: Tensor, **options) -> Source:
    run = run_in_graph if torch.compiler.is_compiling() else run_stages
    return run(stages, x, **options)


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
