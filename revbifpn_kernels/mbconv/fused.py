"""The stages of an MBConv as one autograd Function on the fused norms of `ops/norm_act`.

One pass over the maps does norm, activation and gate, for which modules take three. Statistics and
gates, (C,) and (N, C) numbers, are saved, so that the recompute neither reduces a batch nor
computes squeeze-excite again. Under autocast so are the convolutions' weights in half precision, 2
bytes per weight: they are cast once per step.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..ops.layout import is_channels_last
from ..ops.norm_act.arguments import ACTIVATIONS
from ..ops.norm_act.factors import norm_factors
from ..ops.norm_act.forward import norm_act, norm_act_reference
from ..ops.norm_act.gradient import norm_act_grad
from ..ops.norm_act.statistics import batch_norm_factors, batch_statistics
from ..ops.resample.folded_norm import ScaledSource, Source
from ..ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad
from ..ops.squeeze_excite.norm_act_gates import norm_act_gates
from ..reversible import Pullback, recompute
from .convolutions import convolve, convolve_backward
from .drop_path import drop_factors
from .stages import Stage, is_autocast
from .synchronised import group_gradients, group_statistics


class SavedStatistics(NamedTuple):
    """What the recompute of a stage reuses."""

    mean: Tensor  # (C,), as invstd
    invstd: Tensor
    scale: Tensor | None  # (N, C), as shift, of a norm that RevSilo or RevBlock applies
    shift: Tensor | None
    se_gate: Tensor | None  # (N, C), of squeeze-excite
    se_means: Tensor | None  # (N, C), from which squeeze-excite computes its gate
    drop_factors: Tensor | None  # (N,), what stochastic depth multiplies samples by
    # With synchronised batch norm only:
    count: Tensor | None  # (), values per channel over all processes
    group: dist.ProcessGroup | None

    def multiplier(self, channels: int) -> Tensor | None:
        """What the stage's result is multiplied by, (N, C), or None."""
        if self.drop_factors is None:
            return self.se_gate
        return self.drop_factors[:, None].repeat(1, channels)


class SavedStages(NamedTuple):
    """What all stages save, recorded as one event."""

    statistics: list[SavedStatistics]
    weights: list[Tensor]  # of the convolutions, as autocast casts them; empty if it does not


def run_stages(stages: Sequence[Stage], x: Tensor, *, folds_norm: bool = False) -> Source:
    """Run the stages one after the other, with a graph if one is wanted; return the result.

    With `folds_norm` the last norm, and stochastic depth after it, are returned as factors, which
    the operator that reads the maps applies. `ops/resample/folded_norm.py` tells which gradient
    the maps then get.
    """
    recorder = recompute.current_recorder()
    run, parameters = _run_of(stages, recorder, folds_norm)
    x = _cast(x)
    run.saves_maps = torch.is_grad_enabled() and any(_needs_grad(x, parameters))
    with _without_autocast(x.device.type), _unseen(recorder):
        y = _Stages.apply(run, x, *parameters) if run.saves_maps else run.forward(x, parameters)
    if recorder is not None and not run.is_recompute:
        recorder.save(run.saved, updated=[b for stage in stages for b in stage.updated_buffers()])
    return ScaledSource(*y) if folds_norm else y


def rerun_stages(stages: Sequence[Stage], x: Tensor) -> Pullback:
    """Return what `run_stages` with `folds_norm` returned in the forward; makes no graph."""
    recorder = recompute.current_recorder()
    run, parameters = _run_of(stages, recorder, True)
    needs = _needs_grad(x, parameters)
    run.saves_maps = any(needs)
    with torch.no_grad():
        maps = _cast(x)
        with _without_autocast(x.device.type), _unseen(recorder):
            output = run.forward(maps, parameters)
    return Pullback(
        output, parameters, functools.partial(run.pull_back, parameters, needs, x.dtype)
    )


def _run_of(stages: Sequence[Stage], recorder, folds_norm: bool):
    """The run to make of the stages, and their parameters."""
    saved = None
    parameters = [p for stage in stages for p in stage.parameters()]
    if recorder is not None and not recorder.is_recording:
        saved = recorder.saved(SavedStages)
        if recorder.stand_ins:
            parameters = [recorder.stand_ins.get(id(p), p) for p in parameters]
    return _StagesRun(stages, folds_norm, saved), parameters


def _cast(x: Tensor) -> Tensor:
    """`x` as autocast casts it."""
    return _as(x, torch.get_autocast_dtype(x.device.type)) if is_autocast(x) else x


def _needs_grad(x: Tensor, parameters: Sequence[Tensor | None]) -> list[bool]:
    return [x.requires_grad, *[p is not None and p.requires_grad for p in parameters]]


def _unseen(recorder) -> contextlib.AbstractContextManager:
    """Hide calls from RecordMode and ReplayMode: stages save what their recompute needs."""
    return contextlib.nullcontext() if recorder is None else torch._C.DisableTorchFunction()


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    is_on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext()


class _StagesRun:
    """One run of the stages: a forward, or the recompute of the forward that saved `saved`."""

    def __init__(
        self, stages: Sequence[Stage], folds_norm: bool, saved: SavedStages | None
    ) -> None:
        self.stages, self.folds_norm, self.saves_maps = stages, folds_norm, False
        self.is_recompute = saved is not None
        self.saved = SavedStages([], []) if saved is None else saved
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
        statistics, weights = self.saved
        parts = self.split(parameters)
        if not self.is_recompute:
            self._cast_weights([own[0] for own in parts], x.dtype)
        weights = weights or [own[0] for own in parts]
        for k, (stage, own) in enumerate(zip(self.stages, parts, strict=True)):
            _, gamma, beta, *squeeze = own
            u = convolve(stage.conv, x, weights[k])
            if not self.is_recompute:
                is_folded = self.folds_norm and k + 1 == len(self.stages)
                statistics.append(_measure(stage, u, gamma, beta, squeeze, is_folded))
            saved = statistics[k]
            if self.saves_maps:
                self.maps += [x, u]
            norm = saved.mean, saved.invstd, gamma, beta
            if saved.scale is not None:
                return ScaledSource(u, saved.scale, saved.shift)
            x = norm_act(u, *norm, saved.multiplier(u.shape[1]), stage.act)
        return x

    def _cast_weights(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Save the weights in the dtype of the maps if they have another, cast by one call."""
        if any(weight.dtype != dtype for weight in weights):
            self.saved.weights.extend([torch.empty_like(w, dtype=dtype) for w in weights])
            torch._foreach_copy_(self.saved.weights, weights)

    def backward(
        self, maps: list[Tensor], parameters: Sequence[Tensor | None], grad: Tensor, needs
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the input and of the parameters; takes the maps out of their list."""
        own, needed = self.split(parameters), self.split(needs[1:])
        weights = self.saved.weights or [part[0] for part in own]
        grads: list[Tensor | None] = []
        for k in reversed(range(len(self.stages))):
            u, x = maps.pop(), maps.pop()
            grad, own_grads = _stage_backward(
                self.stages[k], grad, (x, u), self.saved.statistics[k],
                [weights[k], *own[k][1:]], (k > 0 or needs[0], needed[k][0]),
            )  # fmt: skip
            grads = own_grads + grads
        return grad if needs[0] else None, _like_parameters(grads, parameters)

    def pull_back(self, parameters, needs, dtype: torch.dtype, grad: Tensor):
        """`backward` of a run without a graph; the gradient of the input in `dtype`."""
        if not self.saves_maps:
            return None, []
        with _without_autocast(grad.device.type):
            grad_x, grads = self.backward(self.maps, parameters, grad, needs)
        return None if grad_x is None else _as(grad_x, dtype), grads


def _like_parameters(
    grads: Sequence[Tensor | None], parameters: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients in the shapes and dtypes of their parameters, cast by one call."""
    found = [
        None if g is None or p is None else g if g.shape == p.shape else g.view_as(p)
        for g, p in zip(grads, parameters, strict=True)
    ]
    halves = [k for k, g in enumerate(found) if g is not None and g.dtype != parameters[k].dtype]
    if halves:
        cast = [torch.empty_like(found[k], dtype=parameters[k].dtype) for k in halves]
        torch._foreach_copy_(cast, [found[k] for k in halves])
        for k, whole in zip(halves, cast, strict=True):
            found[k] = whole
    return found


def _measure(stage: Stage, u: Tensor, gamma, beta, squeeze, is_folded: bool) -> SavedStatistics:
    """Return statistics, gates or factors of a forward; update the running statistics."""
    scale = shift = gate = means = kept = None
    norm, buffers = stage.norm, stage.norm._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    count, group = None, recompute.group_of(norm)
    if group is not None:
        *statistics, count = group_statistics(u, norm, group)
    elif stage.is_batch:
        if u.numel() == u.shape[1]:
            raise ValueError(
                f"MBConv: batch norm needs more than 1 value per channel in training, got maps of "
                f"{tuple(u.shape)}"
            )
        options = norm.eps, mean, var, buffers["num_batches_tracked"], norm.momentum
        if is_folded:
            *statistics, scale, shift = batch_norm_factors(u, gamma, beta, *options)
        else:
            statistics = batch_statistics(u, *options)
    else:
        # Copied: the backward needs this mean, and the buffer may be updated before it runs.
        statistics = mean.clone(), (var + norm.eps).rsqrt()
    if stage.squeeze is not None:
        acts = stage.act, stage.squeeze_act
        gate, means = norm_act_gates(u, *statistics, gamma, beta, *squeeze, *acts)
    elif stage.drop_path > 0:
        kept = drop_factors(stage.drop_path, u.shape[0], statistics[0])
    if is_folded and (scale is None or kept is not None):
        samples = 1 if kept is None else len(kept)
        scale, shift = norm_factors(*statistics, gamma, beta, kept, samples)
    if is_folded:
        scale, shift = scale.expand(u.shape[:2]), shift.expand(u.shape[:2])
    return SavedStatistics(*statistics, scale, shift, gate, means, kept, count, group)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(grad: Tensor, maps: Tensor) -> Tensor:
    """`grad` in the memory format and dtype of `maps`; not copied if they match, even a slice."""
    is_alike = is_channels_last(grad) == is_channels_last(maps)
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
            grad_x, grads = run.backward(list(maps), parameters, grad, needs)
        return None, grad_x, *grads


def _stage_backward(
    stage: Stage,
    grad: Tensor,
    maps: tuple[Tensor, Tensor],
    saved: SavedStatistics,
    parameters: Sequence[Tensor | None],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of a stage's input and parameters; `maps`: its input, conv(input)."""
    x, u = maps
    weight, gamma, beta, *squeeze = parameters
    norm = saved.mean, saved.invstd, gamma, beta
    grad = _like(grad, u)
    gates = saved.multiplier(u.shape[1])
    acts = stage.act, stage.squeeze_act
    if saved.group is not None:
        means = () if stage.squeeze is None else (saved.se_means,)
        grad_u, *norm_grads = group_gradients(
            grad, u, norm, gates, (*means, *squeeze), acts, saved.count, saved.group
        )
    elif stage.squeeze is None:
        grad_u, *norm_grads = norm_act_grad(
            grad, u, *norm, gates, None, None, stage.act, stage.is_batch
        )
    else:
        grad_u, *norm_grads = norm_act_excite_grad(
            grad, u, *norm, gates, saved.se_means, *squeeze, *acts, stage.is_batch
        )
    grad_x, grad_weight = convolve_backward(stage.conv, grad_u, x, weight, needs)
    return grad_x, [grad_weight, *norm_grads]


def _differentiable(
    run: _StagesRun, inputs: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients as a graph of PyTorch's operations, to be differentiated again."""
    inputs = [t if t is None else t.view_as(t) for t in inputs]  # hooks run once
    y, *parameters = inputs  # y is the input, then each stage's result
    for stage, own, saved in zip(
        run.stages, run.split(parameters), run.saved.statistics, strict=True
    ):
        y = _composed(stage, y, own, saved)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


def _composed(stage: Stage, x: Tensor, parameters, saved: SavedStatistics) -> Tensor:
    """Return a stage's result by PyTorch's operations."""
    if saved.group is not None:
        raise RuntimeError(
            "MBConv: synchronised batch norm has no gradient of gradients (create_graph=True); "
            "expected BatchNorm2d"
        )
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
