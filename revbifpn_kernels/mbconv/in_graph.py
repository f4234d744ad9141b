"""The fused stages of an MBConv in a graph of torch.compile.

Dynamo reads the modules, so that its guards notice what changes, and hands numbers and tensors to
one function that it does not trace; AOTAutograd traces that function with its gradient. The graph
then holds convolutions and our operators, which need no code generation.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.pytorch import in_graph
from ..compiler.trace import restores_maps
from ..ops.resample.folded_norm import ScaledSource, Source
from ..reversible import recompute
from .convolutions import ConvInGraph
from .fused import run_stages
from .stages import Stage, fit, has_kernels, is_autocast, stages_read
from .synchronised import SyncBatchNorm2d

_SIZES = "kernel_size", "stride", "padding", "dilation", "groups"
_BUFFERS = "running_mean", "running_var", "num_batches_tracked"


def stages_for_graph(mbconv: nn.Module, x: Tensor) -> list[Stage] | None:
    """The stages to put into the graph that Dynamo traces; None where it must trace modules."""
    # A transform that is compiled by itself, in a block that the engine runs, is its modules.
    if torch.compiler.is_exporting() or recompute.is_traced() or not restores_maps():
        return None
    if not (mbconv.training and has_kernels(x)):
        return None
    stages = stages_read(mbconv)
    if stages is None or any([type(stage.norm) is SyncBatchNorm2d for stage in stages]):
        return None
    return stages if fit(stages, x) else None


def run_in_graph(stages: Sequence[Stage], x: Tensor, *, folds_norm: bool = False) -> Source:
    """`run_stages` as one call in the graph that Dynamo traces."""
    if is_autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    numbers, tensors = [], []
    for stage in stages:
        conv, norm = stage.conv, stage.norm
        numbers.append((
            [getattr(conv, name) for name in _SIZES],
            (norm.eps, norm.momentum, stage.is_batch, stage.act),
            (stage.squeeze is not None, stage.squeeze_act, stage.drop_path),
        ))  # fmt: skip
        weight, *others = stage.parameters()
        tensors.append([weight.to(x.dtype), *others, *[norm._buffers[name] for name in _BUFFERS]])
    y = _run(numbers, tensors, folds_norm, x)
    return ScaledSource(*y) if folds_norm else y


@in_graph
def _run(
    numbers: Sequence[Any], tensors: Sequence[list[Tensor | None]], folds_norm: bool, x: Tensor
) -> Tensor | tuple[Tensor, ...]:
    stages = [_stage(*given) for given in zip(numbers, tensors, strict=True)]
    y = run_stages(stages, x, folds_norm=folds_norm)
    return tuple(y) if folds_norm else y


def _stage(numbers: Any, tensors: Sequence[Tensor | None]) -> Stage:
    """A stage of stand-ins for the modules, with these numbers and tensors."""
    sizes, (eps, momentum, is_batch, act), rest = numbers
    has_squeeze, squeeze_act, drop_path = rest
    weight, gamma, beta, *others = tensors
    squeeze, buffers = others[:-3], others[-3:]
    conv = ConvInGraph(
        **dict(zip(_SIZES, sizes, strict=True)), _parameters={"weight": weight, "bias": None}
    )
    norm = SimpleNamespace(
        _parameters={"weight": gamma, "bias": beta},
        _buffers=dict(zip(_BUFFERS, buffers, strict=True)),
        eps=eps,
        momentum=momentum,
    )
    convs = None
    if has_squeeze:
        pairs = (zip(("weight", "bias"), pair, strict=True) for pair in (squeeze[:2], squeeze[2:]))
        convs = tuple(SimpleNamespace(_parameters=dict(pair)) for pair in pairs)
    return Stage(conv, norm, is_batch, act, convs, squeeze_act, drop_path)
