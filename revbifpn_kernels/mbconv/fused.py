"""MBConv as one autograd Function on the fused norms of `ops/norm_act.py`.

A stage is a convolution, its norm, an activation and a gate, of squeeze-excite or of stochastic
depth: u = conv(x), y = act(norm(u)) · gate. Its maps pass through memory once where modules take a
pass each for norm, activation and gate. For a second run statistics and gates are kept, (C,) and
(N, C) numbers, so that it neither reduces a batch nor asks squeeze-excite again.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.conv.depthwise import depthwise_input_grad, depthwise_weight_grad
from ..ops.conv.pointwise_conv import pointwise_conv, pointwise_conv_backward
from ..ops.layout import Geometry
from ..ops.norm_act.arguments import ACTIVATIONS, sums_dtype
from ..ops.norm_act.factors import norm_factors
from ..ops.norm_act.forward import norm_act_reference
from ..ops.resample.folded_norm import ScaledSource
from ..reversible import recompute as replay
from .drop_path import kept_samples

_ops = torch.ops.revbifpn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# PyTorch's gradient of smaller depthwise kernels' weights is as fast as ours; that of their inputs
# for float32, or without strides.
SMALLEST_OWN_KERNEL = 5


class Stage(NamedTuple):
    """A convolution, its norm and what follows, as they are when the stage is made."""

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

    def fits(self, x: Tensor) -> bool:
        """Whether convolution and norm have the dtypes that go with x, and plain tensors."""
        weight, *held = parameters = self.parameters()
        statistics = self.norm._buffers["running_mean"], self.norm._buffers["running_var"]
        is_cast = _is_cast(x) and weight.dtype != torch.float64
        dtype = sums_dtype(x)
        return (
            (is_cast or weight.dtype == x.dtype)
            and all(t is None or t.dtype == dtype for t in (*held, *statistics))
            and all(t is None or t.is_contiguous() for t in (*held[:2], *statistics))
            and not any(map(is_traceable_wrapper_subclass, parameters))
        )

    def moved(self) -> list[Tensor]:
        """The buffers that a first run moves."""
        buffers = self.norm._buffers.values() if self.is_batch else ()
        return [buffer for buffer in buffers if buffer is not None]


class Memory(NamedTuple):
    """What the second run of a stage need not compute again."""

    mean: Tensor  # (C,), as invstd
    invstd: Tensor
    gate: Tensor | None  # (N, C), of squeeze-excite
    means: Tensor | None  # (N, C), what squeeze-excite saw
    kept: Tensor | None  # (N,), what stochastic depth multiplies samples by

    def gates(self, channels: int) -> Tensor | None:
        """What the result is multiplied by, (N, C)."""
        if self.kept is None:
            return self.gate
        return self.kept[:, None].repeat(1, channels)


class Memories(NamedTuple):
    """Those of all stages."""

    stages: list[Memory]

    def tensors(self) -> Iterator[Tensor]:
        return (t for memory in self.stages for t in memory if t is not None)


class Maps(NamedTuple):
    """What a stage's gradient needs: its input, and the convolution's result."""

    x: Tensor
    u: Tensor


def can_run(x: Tensor) -> bool:
    """Whether there are kernels for x, and nobody wants to see the operations one by one."""
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.numel() > 0
        and x.dtype in DTYPES
        and (x.is_cpu or (x.is_cuda and x.dtype != torch.float64))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _is_cast(x: Tensor) -> bool:
    """Whether autocast casts x; it leaves float64 alone."""
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def run_stages(stages: Sequence[Stage], leaves_norm: bool, x: Tensor) -> Tensor | ScaledSource:
    """The result of the stages one after the other, with a graph if one is wanted.

    With `leaves_norm` the last norm, and stochastic depth after it, are left to the fusion that
    reads the result. In the graph the gradient of its maps is then that of the norm's result, which
    is what the fusion's adjoint gives.
    """
    recorder = replay.recorder()
    known = None if recorder is None else recorder.recall(Memories)
    parameters = [p for stage in stages for p in stage.parameters()]
    if recorder is not None:
        parameters = [recorder.used(p) for p in parameters]
    device = x.device.type
    if _is_cast(x):
        x = x.to(torch.get_autocast_dtype(device))
    wants_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *parameters)
    )
    call = _Call(stages, leaves_norm, known.stages if known else None, wants_graph)
    # Who watches calls need not see ours.
    unseen = contextlib.nullcontext() if recorder is None else torch._C.DisableTorchFunction()
    with _without_autocast(device), unseen:
        y = _Stages.apply(call, x, *parameters) if wants_graph else call.forward(x, parameters)
    if leaves_norm:
        y = ScaledSource(*y)
    if recorder is not None and known is None:
        recorder.remember(Memories(call.memories), [b for s in stages for b in s.moved()])
    return y


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    is_on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext()


class _Call:
    """One run of stages."""

    def __init__(
        self,
        stages: Sequence[Stage],
        leaves_norm: bool,
        known: list[Memory] | None,
        keeps_maps: bool,
    ) -> None:
        self.stages, self.leaves_norm, self.keeps_maps = stages, leaves_norm, keeps_maps
        self.is_second = known is not None
        self.memories: list[Memory] = known or []
        self.maps: list[Maps] = []

    def split(self, parameters: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
        """The parameters of each stage."""
        parts, begin = [], 0
        for stage in self.stages:
            end = begin + (3 if stage.squeeze is None else 7)
            parts.append(parameters[begin:end])
            begin = end
        return parts

    def forward(self, x: Tensor, parameters: Sequence[Tensor | None]) -> Tensor | ScaledSource:
        for k, (stage, own) in enumerate(zip(self.stages, self.split(parameters), strict=True)):
            weight, gamma, beta, *squeeze = own
            u = _convolve(stage.conv, x, _as(weight, x.dtype))
            if not self.is_second:
                self.memories.append(_measure(stage, u, gamma, beta, squeeze))
            memory = self.memories[k]
            if self.keeps_maps:
                self.maps.append(Maps(x, u))
            norm = memory.mean, memory.invstd, gamma, beta
            if self.leaves_norm and k + 1 == len(self.stages):
                return ScaledSource(u, *norm_factors(*norm, memory.kept, len(u)))
            x = _ops.norm_act(u, *norm, memory.gates(u.shape[1]), stage.act)
        return x


def _measure(stage: Stage, u: Tensor, gamma, beta, squeeze) -> Memory:
    """Statistics and gates of a first run; running statistics move."""
    norm, buffers = stage.norm, stage.norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if stage.is_batch:
        if u.numel() == u.shape[1]:
            raise ValueError(
                f"MBConv: batch norm needs more than 1 value a channel in training, got maps of "
                f"{tuple(u.shape)}"
            )
        statistics = _ops.batch_statistics(
            u, norm.eps, mean, var, buffers["num_batches_tracked"], norm.momentum
        )
    else:
        # A copy: a backward wants the mean of now, and the buffer may move before it.
        statistics = mean.clone(), (var + norm.eps).rsqrt()
    gate = means = kept = None
    if stage.squeeze is not None:
        means = _ops.norm_act_means(u, *statistics, gamma, beta, stage.act)
        gate = _ops.squeeze_excite_gates(means, *squeeze, stage.squeeze_act)
    elif stage.drop_path > 0:
        kept = kept_samples(stage.drop_path, len(u), statistics[0])
    return Memory(*statistics, gate, means, kept)


def _is_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 1×1 convolution is a matrix product of pixels: faster on a CPU's channels_last."""
    is_dense = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    return is_dense and conv.padding == (0, 0) and x.is_cpu and Geometry.of(x).channels_last


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    if _is_product(conv, x):
        return pointwise_conv(x, weight)
    return F.conv2d(x, weight, None, conv.stride, conv.padding, groups=conv.groups)


def _convolve_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight."""
    needs_x, needs_weight = needs
    kernel = conv.kernel_size[0]
    if _is_product(conv, x):
        if needs_weight:
            return pointwise_conv_backward(grad, x, weight)
        return pointwise_conv(grad, weight.transpose(0, 1)), None
    is_depthwise = x.is_cpu and x.stride(1) == 1 and conv.groups == x.shape[1] == len(weight)
    sizes = {"stride": conv.stride[0], "padding": conv.padding[0]}
    grad_x = grad_weight = None
    if is_depthwise and needs_weight and kernel >= SMALLEST_OWN_KERNEL:
        grad_weight = depthwise_weight_grad(x, grad, kernel_size=kernel, **sizes)
        needs_weight = False
    if is_depthwise and needs_x and sizes["stride"] > 1 and x.itemsize == 2:
        grad_x = depthwise_input_grad(grad, weight, x.shape[2:], **sizes)
        needs_x = False
    if needs_x or needs_weight:
        theirs = torch.ops.aten.convolution_backward(
            grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
            conv.groups, [needs_x, needs_weight, False],
        )  # fmt: skip
        grad_x = theirs[0] if needs_x else grad_x
        grad_weight = theirs[1] if needs_weight else grad_weight
    return grad_x, grad_weight


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(grad: Tensor, maps: Tensor) -> Tensor:
    """`grad` in the memory format and dtype of `maps`, which the kernels walk together; channels of
    larger maps are left where they are."""
    is_alike = Geometry.of(grad).channels_last == Geometry.of(maps).channels_last
    if is_alike and grad.dtype == maps.dtype:
        return grad
    return torch.empty_like(maps).copy_(grad)


class _Stages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, x: Tensor, *parameters: Tensor | None):
        y = call.forward(x, parameters)
        maps = [t for pair in call.maps for t in pair]
        ctx.save_for_backward(*parameters, *maps)
        call.maps.clear()
        ctx.call = call
        if isinstance(y, ScaledSource):
            ctx.mark_non_differentiable(y.scale, y.shift)
            ctx.set_materialize_grads(False)  # no zeros for those two
            return tuple(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None):
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        saved, count = ctx.saved_tensors, len(needs) - 1
        parameters, maps = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            with _without_autocast(grad.device.type):
                return None, *_differentiable(call, (maps[0], *parameters), grad, needs)
        parts = list(zip(call.stages, call.split(parameters), call.split(needs[1:]), strict=True))
        grads: list[Tensor | None] = []
        for k in reversed(range(len(parts))):
            stage, own, wanted = parts[k]
            is_needed = k > 0 or needs[0], wanted[0]
            pair = Maps(*maps[2 * k : 2 * k + 2])
            with _without_autocast(grad.device.type):
                grad, own_grads = _stage_backward(
                    stage, grad, pair, call.memories[k], own, is_needed
                )
            grads = own_grads + grads
        return None, grad if needs[0] else None, *grads


def _stage_backward(
    stage: Stage,
    grad: Tensor,
    maps: Maps,
    memory: Memory,
    parameters: Sequence[Tensor | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a stage's input and of its parameters."""
    weight, gamma, beta, *squeeze = parameters
    norm = memory.mean, memory.invstd, gamma, beta
    grad = _like(grad, maps.u)
    gates = memory.gates(maps.u.shape[1])
    if stage.squeeze is None:
        grad_u, *norm_grads = _ops.norm_act_grad(
            grad, maps.u, *norm, gates, None, None, stage.act, stage.is_batch
        )
    else:
        acts = stage.act, stage.squeeze_act
        grad_u, *norm_grads = _ops.norm_act_excite_grad(
            grad, maps.u, *norm, gates, memory.means, *squeeze, *acts, stage.is_batch
        )
    grad_x, grad_weight = _convolve_backward(
        stage.conv, grad_u, maps.x, _as(weight, maps.x.dtype), needs
    )
    grads = [grad_weight, *norm_grads]
    return grad_x, [
        None if g is None or p is None else _as(g.view_as(p), p.dtype)
        for g, p in zip(grads, parameters, strict=True)
    ]


def _differentiable(
    call: _Call, inputs: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients as a graph of PyTorch's operations, which can be differentiated again."""
    inputs = [t if t is None else t.view_as(t) for t in inputs]  # whose hooks must run once
    y, *parameters = inputs
    parts = zip(call.stages, call.split(parameters), call.memories, strict=True)
    for stage, own, memory in parts:
        y = _composed(stage, y, own, memory)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _composed(stage: Stage, x: Tensor, parameters, memory: Memory) -> Tensor:
    """A stage of PyTorch's operations."""
    weight, gamma, beta, *squeeze = parameters
    conv, mean, invstd, gate = stage.conv, memory.mean, memory.invstd, None
    u = F.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, groups=conv.groups)
    if stage.is_batch:
        variance, mean = torch.var_mean(u.to(mean.dtype), (0, 2, 3), correction=0)
        invstd = (variance + stage.norm.eps).rsqrt()
    y = norm_act_reference(u, mean, invstd, gamma, beta, None, stage.act)
    if squeeze:
        reduce, reduce_bias, expand, expand_bias = squeeze
        means = y.to(mean.dtype).mean((2, 3))
        hidden = F.linear(means, reduce.flatten(1), reduce_bias)
        logits = F.linear(ACTIVATIONS[stage.squeeze_act](hidden), expand.flatten(1), expand_bias)
        gate = F.hardtanh(logits / 6 + 0.5, 0.0, 1.0)  # hardsigmoid has no second derivative
    elif memory.kept is not None:
        gate = memory.kept[:, None]
    return y if gate is None else y * gate[:, :, None, None].to(y.dtype)
