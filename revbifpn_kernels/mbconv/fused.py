"""The stages of an MBConv as one autograd Function on the fused norms of `ops/norm_act`.

One pass over the maps does norm, activation and gate, for which modules take three. Statistics and
gates, (C,) and (N, C) numbers, are saved, so that the recompute neither reduces a batch nor
computes squeeze-excite again.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.layout import Geometry
from ..ops.norm_act.arguments import ACTIVATIONS
from ..ops.norm_act.forward import norm_act_reference
from ..ops.resample.folded_norm import ScaledSource, Source
from ..reversible import recompute
from .convolutions import convolve, convolve_backward
from .drop_path import drop_factors
from .stages import Stage, is_autocast

_ops = torch.ops.revbifpn


class SavedStatistics(NamedTuple):
    """What the recompute of a stage reuses."""

    mean: Tensor  # (C,), as invstd
    invstd: Tensor
    scale: Tensor | None  # (N, C) or (1, C), as shift, of a norm that is left to a fusion
    shift: Tensor | None
    se_gate: Tensor | None  # (N, C), of squeeze-excite
    se_means: Tensor | None  # (N, C), from which squeeze-excite computes its gate
    drop_factors: Tensor | None  # (N,), what stochastic depth multiplies samples by

    def multiplier(self, channels: int) -> Tensor | None:
        """What the stage's result is multiplied by, (N, C), or None."""
        if self.drop_factors is None:
            return self.se_gate
        return self.drop_factors[:, None].repeat(1, channels)


class SavedStages(list):
    """The `SavedStatistics` of all stages, recorded as one event."""


def run_stages(stages: Sequence[Stage], x: Tensor, *, folds_norm: bool = False) -> Source:
    """Return the result of the stages one after the other, with a graph if one is wanted.

    With `folds_norm` the last norm, and stochastic depth after it, are left to the fusion that
    reads the result; for the gradient that its maps then get see `ops/resample/folded_norm.py`.
    """
    recorder = recompute.current_recorder()
    saved = None
    parameters = [p for stage in stages for p in stage.parameters()]
    if recorder is not None and not recorder.is_recording:
        saved = recorder.saved(SavedStages)
        parameters = [recorder.stand_ins.get(id(p), p) for p in parameters]
    device = x.device.type
    if is_autocast(x):
        x = x.to(torch.get_autocast_dtype(device))
    wants_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *parameters)
    )
    run = _StagesRun(stages, folds_norm, saved, wants_graph)
    # Hidden from RecordMode and ReplayMode: this function records what it needs itself.
    unseen = contextlib.nullcontext() if recorder is None else torch._C.DisableTorchFunction()
    with _without_autocast(device), unseen:
        y = _Stages.apply(run, x, *parameters) if wants_graph else run.forward(x, parameters)
    if recorder is not None and saved is None:
        recorder.save(run.saved, updated=[b for stage in stages for b in stage.updated_buffers()])
    return ScaledSource(*y) if folds_norm else y


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    is_on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext()


class _StagesRun:
    """One run of the stages: a forward, or the recompute of the forward that returned `saved`."""

    def __init__(
        self, stages: Sequence[Stage], folds_norm: bool, saved: SavedStages | None, saves_maps: bool
    ) -> None:
        self.stages, self.folds_norm, self.saves_maps = stages, folds_norm, saves_maps
        self.is_recompute = saved is not None
        self.saved = SavedStages() if saved is None else saved
        self.maps: list[Tensor] = []  # of each stage its input and the convolution's result

    def split(self, parameters: Sequence) -> list[Sequence]:
        """Split a list with one entry per parameter by stage."""
        parts, begin = [], 0
        for stage in self.stages:
            end = begin + (3 if stage.squeeze is None else 7)  # as many as `stage.parameters()`
            parts.append(parameters[begin:end])
            begin = end
        return parts

    def forward(self, x: Tensor, parameters: Sequence[Tensor | None]) -> Source:
        for k, (stage, own) in enumerate(zip(self.stages, self.split(parameters), strict=True)):
            weight, gamma, beta, *squeeze = own
            u = convolve(stage.conv, x, _as(weight, x.dtype))
            if not self.is_recompute:
                is_folded = self.folds_norm and k + 1 == len(self.stages)
                self.saved.append(_measure(stage, u, gamma, beta, squeeze, is_folded))
            saved = self.saved[k]
            if self.saves_maps:
                self.maps += [x, u]
            norm = saved.mean, saved.invstd, gamma, beta
            if saved.scale is not None:
                planes = u.shape[:2]
                return ScaledSource(u, saved.scale.expand(planes), saved.shift.expand(planes))
            x = _ops.norm_act(u, *norm, saved.multiplier(u.shape[1]), stage.act)
        return x


def _measure(stage: Stage, u: Tensor, gamma, beta, squeeze, is_folded: bool) -> SavedStatistics:
    """Return statistics, gates or factors of a forward; update the running statistics."""
    scale = shift = gate = means = kept = None
    norm, buffers = stage.norm, stage.norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    if stage.is_batch:
        if u.numel() == u.shape[1]:
            raise ValueError(
                f"MBConv: batch norm needs more than 1 value per channel in training, got maps of "
                f"{tuple(u.shape)}"
            )
        options = norm.eps, mean, var, buffers["num_batches_tracked"], norm.momentum
        if is_folded:
            *statistics, scale, shift = _ops.batch_norm_factors(u, gamma, beta, *options)
        else:
            statistics = _ops.batch_statistics(u, *options)
    else:
        # Copied: the backward needs this mean, and the buffer may be updated before it runs.
        statistics = mean.clone(), (var + norm.eps).rsqrt()
    if stage.squeeze is not None:
        acts = stage.act, stage.squeeze_act
        gate, means = _ops.norm_act_gates(u, *statistics, gamma, beta, *squeeze, *acts)
    elif stage.drop_path > 0:
        kept = drop_factors(stage.drop_path, len(u), statistics[0])
    if is_folded and (scale is None or kept is not None):
        samples = 1 if kept is None else len(kept)
        scale, shift = _ops.norm_factors(*statistics, gamma, beta, kept, samples)
    return SavedStatistics(*statistics, scale, shift, gate, means, kept)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(grad: Tensor, maps: Tensor) -> Tensor:
    """`grad` in the memory format and dtype of `maps`; not copied if they match, even a slice."""
    is_alike = Geometry.of(grad).channels_last == Geometry.of(maps).channels_last
    if is_alike and grad.dtype == maps.dtype:
        return grad
    return torch.empty_like(maps).copy_(grad)


class _Stages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: _StagesRun, x: Tensor, *parameters: Tensor | None):
        y = run.forward(x, parameters)
        ctx.save_for_backward(*parameters, *run.maps)
        run.maps.clear()
        ctx.run = run
        if isinstance(y, ScaledSource):
            ctx.mark_non_differentiable(y.scale, y.shift)
            ctx.set_materialize_grads(False)  # no zeros for those two
            return tuple(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor, *_: None):
        run, needs = ctx.run, ctx.needs_input_grad[1:]
        tensors, count = ctx.saved_tensors, len(needs) - 1
        parameters, maps = tensors[:count], tensors[count:]
        with _without_autocast(grad.device.type):
            if torch.is_grad_enabled():
                return None, *_differentiable(run, (maps[0], *parameters), grad, needs)
            own, needed = run.split(parameters), run.split(needs[1:])
            parts = zip(run.stages, run.saved, own, needed, strict=True)
            grads: list[Tensor | None] = []
            for k, (stage, saved, own, needed) in reversed(list(enumerate(parts))):
                x, u = maps[2 * k : 2 * k + 2]
                needs_maps = k > 0 or needs[0], needed[0]
                grad, own_grads = _stage_backward(stage, grad, x, u, saved, own, needs_maps)
                grads = own_grads + grads
        return None, grad if needs[0] else None, *grads


def _stage_backward(
    stage: Stage,
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    saved: SavedStatistics,
    parameters: Sequence[Tensor | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a stage's input and of its parameters."""
    weight, gamma, beta, *squeeze = parameters
    norm = saved.mean, saved.invstd, gamma, beta
    grad = _like(grad, u)
    gates = saved.multiplier(u.shape[1])
    if stage.squeeze is None:
        grad_u, *norm_grads = _ops.norm_act_grad(
            grad, u, *norm, gates, None, None, stage.act, stage.is_batch
        )
    else:
        acts = stage.act, stage.squeeze_act
        grad_u, *norm_grads = _ops.norm_act_excite_grad(
            grad, u, *norm, gates, saved.se_means, *squeeze, *acts, stage.is_batch
        )
    grad_x, grad_weight = convolve_backward(stage.conv, grad_u, x, _as(weight, x.dtype), needs)
    grads = [grad_weight, *norm_grads]
    return grad_x, [
        None if g is None or p is None else _as(g.view_as(p), p.dtype)
        for g, p in zip(grads, parameters, strict=True)
    ]


def _differentiable(
    run: _StagesRun, inputs: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients as a graph of PyTorch's operations, to be differentiated again."""
    inputs = [t if t is None else t.view_as(t) for t in inputs]  # hooks run once
    y, *parameters = inputs  # y is the input, then each stage's result
    for stage, own, saved in zip(run.stages, run.split(parameters), run.saved, strict=True):
        y = _composed(stage, y, own, saved)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _composed(stage: Stage, x: Tensor, parameters, saved: SavedStatistics) -> Tensor:
    """Return a stage's result by PyTorch's operations."""
    weight, gamma, beta, *squeeze = parameters
    conv, mean, invstd, gate = stage.conv, saved.mean, saved.invstd, None
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
    elif saved.drop_factors is not None:
        gate = saved.drop_factors[:, None]
    return y if gate is None else y * gate[:, :, None, None].to(y.dtype)
