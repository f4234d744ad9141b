"""Batch norm with the statistics of all processes' images, on GPUs and on CPUs.

In the forward each process reduces its own images; then the processes exchange 2C + 1 numbers, for
C channels. In the backward they exchange 2C. The recompute reuses the statistics and exchanges
nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.checks import check_float64_is_on_cpu
from ..ops.norm_act.arguments import sums_dtype
from ..ops.norm_act.forward import norm_act
from ..ops.norm_act.gradient import norm_act_input_grad
from ..ops.norm_act.statistics import batch_statistics
from ..ops.norm_act.sums import OF_GATES, norm_act_sums
from ..ops.squeeze_excite.gates import squeeze_excite_gates_backward
from ..reversible import recompute
from .modules import BatchNorm2d


class GroupStatistics(NamedTuple):
    """Mean and 1/√(variance + eps), (C,), and the number of values per channel, ()."""

    mean: Tensor
    invstd: Tensor
    count: Tensor


class SyncBatchNorm2d(BatchNorm2d):
    """Batch norm that in training normalises by the images of all processes of a group together.

    As torch.nn.SyncBatchNorm, but also on CPUs, and inside DDP there. `convert_sync_batchnorm`
    makes it of a model's batch norms. On one process it is `BatchNorm2d`.
    """

    records_itself = True

    def __init__(self, num_features: int, *arguments, process_group=None, **options) -> None:
        super().__init__(num_features, *arguments, **options)
        self.process_group: dist.ProcessGroup | None = process_group  # None: all processes

    def forward(self, x: Tensor) -> Tensor:
        group = recompute.group_of(self)
        return super().forward(x) if group is None else _normalise(self, x, group)


def convert_sync_batchnorm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Return the module with each BatchNorm2d in it replaced by a `SyncBatchNorm2d`.

    As torch.nn.SyncBatchNorm.convert_sync_batchnorm: parameters and buffers are the same tensors,
    names in the `state_dict` stay. Norms that are synchronised already are replaced, too. Call it
    before DDP, FSDP and the optimizer.

    Args:
        process_group: The processes that share statistics. None: those of a norm that is
            synchronised already, else all.
    """
    if type(module) in (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d):
        norm = SyncBatchNorm2d.__new__(SyncBatchNorm2d)
        for name, value in module.__dict__.items():
            norm.__dict__[name] = value.copy() if isinstance(value, dict) else value
        norm.process_group = process_group or getattr(module, "process_group", None)
        return norm
    for name, child in module.named_children():
        module.add_module(name, convert_sync_batchnorm(child, process_group))
    return module


@torch._disable_dynamo
def _normalise(norm: SyncBatchNorm2d, x: Tensor, group) -> Tensor:
    norm._check_input_dim(x)
    check_float64_is_on_cpu("SyncBatchNorm2d", x)
    recorder = recompute.current_recorder()
    with torch._C.DisableTorchFunction():  # recorded here
        if recorder is not None and not recorder.is_recording:
            statistics = recorder.saved(GroupStatistics)
        else:
            statistics = group_statistics(x.detach(), norm, group)
            if recorder is not None:
                recorder.save(statistics, updated=norm._buffers.values())
        return _NormaliseInGroup.apply(x, norm.weight, norm.bias, statistics, group)


class _NormaliseInGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics: GroupStatistics, group):
        if weight is not None:
            weight = weight.to(statistics.mean.dtype)
        if bias is not None:
            bias = bias.to(statistics.mean.dtype)
        ctx.save_for_backward(x, weight, bias)
        ctx.statistics, ctx.group = statistics, group
        return norm_act(x, *statistics[:2], weight, bias, None, "identity")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        mean, invstd, count = ctx.statistics
        norm, acts = (mean, invstd, weight, bias), ("identity", "identity")
        grad = grad.contiguous() if 0 in grad.stride() else grad
        grads = group_gradients(grad, x, norm, None, (), acts, count, ctx.group)
        needs = zip(grads, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in needs), None, None


def group_statistics(x: Tensor, norm: nn.BatchNorm2d, group) -> GroupStatistics:
    """The statistics over the processes of `group`; updates the running ones as PyTorch does."""
    batches, momentum = norm._buffers["num_batches_tracked"], norm.momentum
    C, dtype = x.shape[1], sums_dtype(x)
    # A row per process, zeros but for its own: any backend adds them up.
    rows = x.new_zeros(dist.get_world_size(group), 2 * C + 1, dtype=torch.float64)
    if x.numel() > 0:
        mean, invstd = batch_statistics(x, 0.0, None, None, batches, 0.0)
        count = mean.new_full((1,), x.numel() // C)
        rows[dist.get_rank(group)] = torch.cat([mean, invstd.pow(-2), count])
    elif batches is not None:
        batches.add_(1)
    dist.all_reduce(rows, group=group)
    means, variances, counts = rows.split([C, C, 1], dim=1)
    total = counts.sum()
    shares = counts / total
    shared_mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - shared_mean).square())).sum(0)
    running = norm._buffers["running_mean"], norm._buffers["running_var"]
    unbiased = variance * (total / (total - 1).clamp(min=1))
    if momentum is None:  # a cumulative average, if there is one
        momentum = 0.0 if batches is None else 1.0 / float(batches)
    for buffer, value in zip(running, (shared_mean, unbiased), strict=True):
        if buffer is not None:
            buffer.lerp_(value.to(buffer.dtype), momentum)
    found = shared_mean, (variance + norm.eps).rsqrt(), total
    return GroupStatistics(*(values.to(dtype) for values in found))


def group_gradients(
    grad: Tensor,
    x: Tensor,
    norm: Sequence[Tensor | None],
    gate: Tensor | None,
    squeeze: Sequence[Tensor],
    acts: tuple[str, str],
    count: Tensor,
    group,
) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias, and of squeeze-excite's parameters if there are any.

    Those of parameters are of this process' images, as DDP expects them.

    Args:
        norm: Mean, invstd, weight and bias.
        gate: (N, C), what the result was multiplied by, or None.
        squeeze: Empty, or squeeze-excite's means and its four parameters.
        acts: The activation, and that of squeeze-excite.
        count: Values per channel over all processes, ().
    """
    act, squeeze_act = acts
    sums = norm_act_sums(grad, x, *norm, act, bool(squeeze))
    grad_means, grads = None, []
    if squeeze:
        grad_means, *grads = squeeze_excite_gates_backward(sums[OF_GATES], *squeeze, squeeze_act)
    totals = sums[:2] if gate is None else sums[:2] * gate
    if grad_means is not None:
        totals = totals + sums[2:4] * (grad_means / x[0, 0].numel())
    dbias, along_x = totals.sum(1)
    dweight = along_x * norm[1]
    shared = torch.stack([dweight, dbias])
    dist.all_reduce(shared, group=group)
    dx = norm_act_input_grad(grad, x, *norm, gate, grad_means, *(shared / count), act)
    return dx, dweight, dbias, *grads
