"""Synchronised batch norm: statistics over the images of all processes, on GPUs and on CPUs.

In the forward each process computes mean and variance of its own images; then the processes
exchange 2·C + 1 numbers, for C channels. In the backward they exchange 2·C. The recompute reuses
the statistics and exchanges nothing.
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
    """Of all processes: mean and 1/√(variance + eps), (C,), and the values per channel, ()."""

    mean: Tensor
    invstd: Tensor
    count: Tensor


class SyncBatchNorm2d(BatchNorm2d):
    """Batch norm over (N, C, H, W) whose statistics are of the images of all processes in a group.

    Equivalent to torch.nn.SyncBatchNorm in training, but it also runs on CPUs. On one process, and
    in eval mode, it is `BatchNorm2d`. `convert_sync_batchnorm` puts it into a model.
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
    """Return the module with each batch norm in it replaced by a `SyncBatchNorm2d`.

    Replaces BatchNorm2d and torch.nn.SyncBatchNorm, but neither subclasses of these nor
    BatchNorm1d and BatchNorm3d. A norm that is replaced must get inputs (N, C, H, W). Parameters,
    buffers and the keys of the `state_dict` stay the same. Call it before you wrap the model in DDP
    or FSDP.

    Args:
        module: A model, which is changed in place, or a single norm, for which a new one is
            returned.
        process_group: The processes that share statistics. With None, a norm that is synchronised
            already keeps its group, and other norms use all processes.
    """
    norms = (part for part in module.modules() if type(part) in _CONVERTED)
    converted = {norm: _converted(norm, process_group) for norm in norms}
    for part in list(module.modules()):
        for name, child in part._modules.items():
            part._modules[name] = converted.get(child, child)
    return converted.get(module, module)


_CONVERTED = (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)


def _converted(norm: nn.Module, process_group: dist.ProcessGroup | None) -> SyncBatchNorm2d:
    new = SyncBatchNorm2d.__new__(SyncBatchNorm2d)
    for name, value in norm.__dict__.items():
        new.__dict__[name] = value.copy() if isinstance(value, dict) else value
    new.process_group = process_group or getattr(norm, "process_group", None)
    return new


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
    """The statistics over the processes of `group`; updates running statistics like PyTorch."""
    batches, momentum = norm._buffers["num_batches_tracked"], norm.momentum
    C, dtype = x.shape[1], sums_dtype(x)
    # One row per process. Each fills its own and leaves zeros in the others, so a sum gathers them.
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
    if momentum is None:  # a cumulative average; no update if batches are not counted
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

    Gradients of parameters are sums over this process' images only, because DDP reduces them.

    Args:
        norm: Mean, invstd, weight and bias.
        gate: (N, C), the factors that multiplied act(norm(x)), or None.
        squeeze: Empty, or the means that squeeze-excite read and its four parameters.
        acts: The activation after the norm, and the one inside squeeze-excite.
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
