"""The stages of an MBConv, which can run fused if its layers are plain and have no hooks.

A stage is a convolution, its norm, an activation and a gate, of squeeze-excite or of stochastic
depth: u = conv(x), y = act(norm(u)) · gate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.norm_act.arguments import sums_dtype
from ..reversible.recompute.snapshot import Snapshot, snapshot_of
from .drop_path import DropPath
from .modules import BatchNorm2d, ConvNorm, SqueezeExcite
from .synchronised import SyncBatchNorm2d

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Not nn.SyncBatchNorm: as a module it exchanges other messages than a fused stage would. If a hook
# makes one process run module by module, it would wait for the others for ever.
NORMS = (BatchNorm2d, nn.BatchNorm2d, SyncBatchNorm2d)
_CONVS = ("expand", "depthwise", "project")
_ORDER = ("expand", "depthwise", "squeeze_excite", "project", "drop_path")
_ACTS = {nn.Hardswish: "hardswish", nn.ReLU: "relu", nn.SiLU: "silu"}
_ACTS |= dict.fromkeys((nn.Identity, type(None)), "identity")


class Stage(NamedTuple):
    """A convolution, its norm and what follows, as they were when the snapshot was taken."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    is_batch: bool  # whether the norm takes its statistics from the batch
    act: str
    squeeze: tuple[nn.Conv2d, nn.Conv2d] | None = None  # of squeeze-excite
    squeeze_act: str = "identity"
    drop_path: float = 0.0

    def parameters(self) -> list[Tensor | None]:
        norm = self.norm._parameters
        own = [self.conv._parameters["weight"], norm["weight"], norm["bias"]]
        for conv in self.squeeze or ():
            own += [conv._parameters["weight"], conv._parameters["bias"]]
        return own

    def has_own_biases(self) -> bool:
        """Whether the convolution has no bias, and those of squeeze-excite have one."""
        return self.conv._parameters["bias"] is None and all(
            [conv._parameters["bias"] is not None for conv in self.squeeze or ()]
        )

    def updated_buffers(self) -> list[Tensor]:
        """The buffers that a forward updates."""
        buffers = self.norm._buffers.values() if self.is_batch else ()
        return [buffer for buffer in buffers if buffer is not None]


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for maps like x."""
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.numel() > 0
        and x.dtype in DTYPES
        and (x.is_cpu or (x.is_cuda and x.dtype != torch.float64))
    )


def can_run(x: Tensor) -> bool:
    """Whether there are kernels for x, and no tracer or transform must see each operation."""
    return (
        has_kernels(x)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts x; it leaves float64 alone."""
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


class MBConvSnapshot(Snapshot):
    """A snapshot of an MBConv's modules, and the stages that they form (None: not fused)."""

    def __init__(self, mbconv: nn.Module) -> None:
        super().__init__(mbconv)
        self.stages = stages_read(mbconv)


def stages_of(mbconv: nn.Module) -> list[Stage] | None:
    """Return the stages, or None if a module is not MBConv's own or has hooks."""
    is_replica = getattr(mbconv, "_is_replica", False)  # DataParallel's hide their parameters
    if is_replica or nn_module._has_any_global_hook():
        return None
    return snapshot_of(mbconv, MBConvSnapshot).stages


def stages_read(mbconv: nn.Module) -> list[Stage] | None:
    """`stages_of`, read from the modules anew."""
    parts = mbconv._modules
    is_ours = tuple(name for name in _ORDER if name in parts) == tuple(parts)
    if not is_ours or "project" not in parts or not all(map(is_unwatched, parts.values())):
        return None
    stages = [_stage_of(parts[name]) for name in _CONVS if name in parts]
    if None in stages:
        return None
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


def fit(stages: Sequence[Stage], x: Tensor) -> bool:
    """Whether the kernels can read the stages' parameters and buffers, for maps like x.

    Weights of convolutions must have x's dtype or be cast to it by autocast, all others the dtype
    of sums; none may be a tensor subclass.
    """
    dtype, sums, is_cast = x.dtype, sums_dtype(x), is_autocast(x)
    for stage in stages:
        if not stage.has_own_biases():
            return False
        weight, *others = stage.parameters()
        buffers = stage.norm._buffers
        dense = *others[:2], buffers["running_mean"], buffers["running_var"]
        if not (weight.dtype == dtype or (is_cast and weight.dtype != torch.float64)):
            return False
        for tensor in (*dense, *others[2:]):
            if tensor is not None and tensor.dtype != sums:
                return False
        for tensor in dense:
            if tensor is not None and not tensor.is_contiguous():
                return False
        for tensor in (weight, *others):
            if type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor):
                return False
    return True


# This file reads `_modules[…]` for speed: `part.conv` would go through nn.Module.__getattr__.
def _act_of(part: nn.Module) -> str | None:
    """The kernels' name of a part's activation; None if they cannot compute it."""
    return _ACTS.get(type(part._modules.get("act")))


def _is_plain(part: nn.Module, kind: type) -> bool:
    is_own = type(part) is kind and _act_of(part) is not None
    return is_own and all(map(is_unwatched, part._modules.values()))


def _stage_of(part: nn.Module) -> Stage | None:
    """The stage that a ConvNorm forms; None if it is another module or has been changed."""
    if not _is_plain(part, ConvNorm) or not part._modules.keys() <= {"conv", "norm", "act"}:
        return None
    conv, norm = part._modules["conv"], part._modules["norm"]
    is_plain = (
        type(conv) is nn.Conv2d
        and type(norm) in NORMS
        and _has_entries(conv, norm)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(sides)) == 1 for sides in (conv.kernel_size, conv.stride, conv.padding))
        and norm.track_running_stats
        and norm.momentum is not None
    )
    return Stage(conv, norm, norm.training, _act_of(part)) if is_plain else None


def _is_plain_squeeze_excite(part: nn.Module) -> bool:
    if not _is_plain(part, SqueezeExcite):
        return False
    convs = part._modules["reduce"], part._modules["expand"]
    return all(
        type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and _has_entries(conv)
        for conv in convs
    )


def _has_entries(*parts: nn.Module) -> bool:
    """Whether weight and bias are parameters; FSDP and users replace them by plain attributes."""
    return all({"weight", "bias"} <= part._parameters.keys() for part in parts)


def is_unwatched(part: nn.Module) -> bool:
    """Whether no hook and no replaced `forward` needs to see the module's calls."""
    return not (
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or part._compiled_call_impl
        or "forward" in part.__dict__
    )
