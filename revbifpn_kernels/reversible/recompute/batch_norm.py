"""Normalisation by batch statistics: running statistics move in the first run alone, and the
second reuses the batch's mean and inverse standard deviation instead of reducing again, unless the
maps are small.

Both runs round alike, bit for bit, and like `torch.nn.functional.batch_norm` on CPUs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rng import NotRepeatable
from .sync_batch_norm import first_gather

# Elements below which reducing a batch again is cheaper than a Function called from Python.
SMALL = 32768


class Statistics(NamedTuple):
    """Mean and inverse standard deviation of a batch, (C,) each."""

    mean: Tensor
    invstd: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from self


class _Normalise(torch.autograd.Function):
    """Batch norm in training mode from statistics known already; the full gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, invstd, eps):
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        if x.is_cuda:  # the kernel that native_batch_norm ends with
            return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        # PyTorch folds weight·invstd into a factor first: given as the weight beside a variance of
        # 1 it makes the same kernel do the same arithmetic.
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


def _first_batch_norm(
    run, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    if not training or _has_one_value_a_channel(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, mean, invstd = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, True, momentum, eps
    )
    if input.numel() >= SMALL:
        run.events.append(Statistics(mean, invstd))
    run.moved += [running for running in (running_mean, running_var) if running is not None]
    return y


def _second_batch_norm(
    events, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    if not training or _has_one_value_a_channel(input):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.numel() >= SMALL:
        statistics = next(events, None)
        if not isinstance(statistics, Statistics):
            raise NotRepeatable("normalised a batch, which it did not do there in its first run")
        if input.is_cuda or _is_dense(input):  # strided maps take a kernel that rounds otherwise
            return _Normalise.apply(input, weight, bias, *statistics, eps)
    return torch.native_batch_norm(input, weight, bias, None, None, True, 0.0, eps)[0]


def _first_instance_norm(run, input, running_mean=None, running_var=None, *args, **kwargs):
    if running_mean is not None and kwargs.get("use_input_stats", True):
        run.moved += [running_mean, running_var]
    return F.instance_norm(input, running_mean, running_var, *args, **kwargs)


def _second_instance_norm(events, input, running_mean=None, running_var=None, *args, **kwargs):
    if kwargs.get("use_input_stats", True):
        running_mean = running_var = None
    return F.instance_norm(input, running_mean, running_var, *args, **kwargs)


def _has_one_value_a_channel(x: Tensor) -> bool:
    """PyTorch refuses it, with a message of its own."""
    return x.numel() == x.size(1)


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def _first_torch_batch_norm(run, x, weight, bias, mean, var, training, momentum, eps, cudnn):
    return _first_batch_norm(run, x, mean, var, weight, bias, training, momentum, eps)


def _second_torch_batch_norm(events, x, weight, bias, mean, var, training, momentum, eps, cudnn):
    return _second_batch_norm(events, x, mean, var, weight, bias, training, momentum, eps)


# They move running statistics without a new version, so that nobody could tell.
HIDDEN = frozenset(
    "native_batch_norm _native_batch_norm_legit _batch_norm_impl_index _batch_norm_with_update "
    "cudnn_batch_norm miopen_batch_norm batch_norm_update_stats batch_norm_gather_stats".split()
)
FIRST = {
    torch.batch_norm: _first_torch_batch_norm,
    F.batch_norm: _first_batch_norm,
    F.instance_norm: _first_instance_norm,
    torch.batch_norm_gather_stats_with_counts: first_gather,
}
SECOND = {
    torch.batch_norm: _second_torch_batch_norm,
    F.batch_norm: _second_batch_norm,
    F.instance_norm: _second_instance_norm,
}
