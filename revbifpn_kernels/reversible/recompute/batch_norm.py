"""Batch norm: only the forward updates running statistics, and on large maps the recompute reuses
the batch's mean and inverse standard deviation instead of reducing again.

Forward and recompute round alike, bit for bit, and like `torch.nn.functional.batch_norm` on CPUs.
`torch.nn.SyncBatchNorm` neither reduces its batch nor gathers from other processes again: PyTorch
calls an autograd Function there that no mode sees, so the module's `forward` is overridden for as
long as a recompute takes.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _PyTorchFunction
from torch.nn.modules.batchnorm import _NormBase

# Elements below which reducing a batch again is cheaper than a Function called from Python.
SMALL = 32768


class Statistics(NamedTuple):
    """Mean and inverse standard deviation of a batch, (C,) each."""

    mean: Tensor
    invstd: Tensor


class SharedStatistics(NamedTuple):
    """The same over all processes, and the number of samples of each."""

    mean: Tensor
    invstd: Tensor
    counts: Tensor


class _Normalise(torch.autograd.Function):
    """Batch norm in training mode from statistics known already; the full gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, eps):
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        if x.is_cuda:  # the kernel that native_batch_norm ends with
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        # PyTorch multiplies weight and invstd first. Their product as weight, with a variance of 1,
        # makes the same kernel do the same arithmetic.
        scale = invstd if weight is None else invstd * weight
        ones = torch.ones_like(mean)
        return torch.native_batch_norm(x, scale, bias, mean, ones, False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return *grads, None, None, None


class _NormaliseTogether(torch.autograd.Function):
    """The end of PyTorch's synchronised Function, from statistics known already; its backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, statistics, group, eps):
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        mean, invstd, counts = statistics
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.process_group = group
        if x.numel() == 0:
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        return *_PyTorchFunction.backward(ctx, grad)[:3], None, None, None


def _batch_norm(
    recorder, input, running_mean, running_var, weight=None, bias=None, training=False,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    running = running_mean, running_var
    if not training or input.numel() == input.size(1):  # PyTorch refuses one value per channel
        return F.batch_norm(input, *running, weight, bias, training, momentum, eps)
    is_large = input.numel() >= SMALL
    if recorder.is_recording:
        y, *found = torch.native_batch_norm(input, weight, bias, *running, True, momentum, eps)
        recorder.save(Statistics(*found) if is_large else None, updated=running)
        return y
    if is_large:
        mean, invstd = recorder.saved(Statistics)
        if input.is_cuda or _is_dense(input):  # strided maps take a kernel that rounds otherwise
            return _Normalise.apply(input, weight, bias, mean, invstd, eps)
    return torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)[0]


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def _torch_batch_norm(recorder, x, weight, bias, mean, var, training, momentum, eps, cudnn):
    return _batch_norm(recorder, x, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(recorder, input, running_mean=None, running_var=None, *args, **kwargs):
    if running_mean is not None and kwargs.get("use_input_stats", True):
        if recorder.is_recording:
            recorder.save(None, updated=(running_mean, running_var))
        else:
            running_mean = running_var = None
    return F.instance_norm(input, running_mean, running_var, *args, **kwargs)


def _gather_statistics(
    recorder, input, means, invstds, running_mean, running_var, momentum, eps, counts
):
    """The statistics over all processes, from those that SyncBatchNorm gathered."""
    if not recorder.is_recording:
        return recorder.saved(SharedStatistics)[:2]
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        input, means, invstds, running_mean, running_var, momentum, eps, counts
    )
    statistics = SharedStatistics(mean, invstd, counts.view(-1, 1).to(torch.int32))
    recorder.save(statistics, updated=(running_mean, running_var))
    return mean, invstd


@contextlib.contextmanager
def reused(norms: Sequence[nn.SyncBatchNorm], recorder) -> Iterator[None]:
    """Let the norms that are synchronised take their statistics from `recorder`."""
    norms = [norm for norm in norms if group_of(norm) is not None]
    own = [norm.__dict__.get("forward") for norm in norms]
    for norm in norms:
        norm.forward = functools.partial(_normalise_together, norm, recorder)
    try:
        yield
    finally:
        for norm, forward in zip(norms, own, strict=True):
            del norm.forward
            if forward is not None:
                norm.forward = forward


def _normalise_together(norm: nn.SyncBatchNorm, recorder, x: Tensor) -> Tensor:
    statistics = recorder.saved(SharedStatistics)
    return _NormaliseTogether.apply(x, norm.weight, norm.bias, statistics, group_of(norm), norm.eps)


def group_of(part: nn.Module) -> dist.ProcessGroup | None:
    """The processes whose images a norm normalises together; None if it does so with no others."""
    if not (isinstance(part, _NormBase) and part.training and "process_group" in part.__dict__):
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = part.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


# They update running statistics without a new version, which the engine could not notice.
HIDDEN = frozenset(
    "native_batch_norm _native_batch_norm_legit _batch_norm_impl_index _batch_norm_with_update "
    "cudnn_batch_norm miopen_batch_norm batch_norm_update_stats batch_norm_gather_stats".split()
)
NORMS = {
    torch.batch_norm: _torch_batch_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch.batch_norm_gather_stats_with_counts: _gather_statistics,
}
