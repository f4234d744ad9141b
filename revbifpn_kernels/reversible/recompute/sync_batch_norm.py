"""`torch.nn.SyncBatchNorm`: the second run reuses the statistics of all processes, so it neither
reduces the batch nor gathers from the others again. Its backward is PyTorch's.

PyTorch calls an autograd Function there that no mode sees, so the module's `forward` is overridden
for as long as the second run takes.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _PyTorchFunction

from .rng import NotRepeatable


class SharedStatistics(NamedTuple):
    """Mean and inverse standard deviation, (C,) each, over all processes; samples of each."""

    mean: Tensor
    invstd: Tensor
    counts: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from self


class _NormaliseTogether(torch.autograd.Function):
    """The end of PyTorch's Function, from statistics known already."""

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


def first_gather(run, input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        input, mean, invstd, running_mean, running_var, momentum, eps, counts
    )
    shared = SharedStatistics(mean, invstd, counts.view(-1, 1).to(torch.int32))
    run.events.append(shared)
    run.moved += [running for running in (running_mean, running_var) if running is not None]
    return mean, invstd


def _second_forward(norm: nn.SyncBatchNorm, events: Iterator, x: Tensor) -> Tensor:
    statistics = next(events, None)
    if not isinstance(statistics, SharedStatistics):
        raise NotRepeatable("synchronised a batch, which it did not do there in its first run")
    return _NormaliseTogether.apply(
        x, norm.weight, norm.bias, statistics, _group_of(norm), norm.eps
    )


@contextlib.contextmanager
def reused(parts: Sequence[nn.Module], events: Iterator) -> Iterator[None]:
    """Let all synchronised norms among `parts` take their statistics from `events`."""
    norms = [part for part in parts if _is_synchronised(part)]
    own = [norm.__dict__.get("forward") for norm in norms]
    for norm in norms:
        norm.forward = functools.partial(_second_forward, norm, events)
    try:
        yield
    finally:
        for norm, forward in zip(norms, own, strict=True):
            del norm.forward
            if forward is not None:
                norm.forward = forward


def _is_synchronised(part: nn.Module) -> bool:
    return (
        isinstance(part, nn.SyncBatchNorm)
        and part.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(_group_of(part)) > 1
    )


def _group_of(norm: nn.SyncBatchNorm) -> dist.ProcessGroup:
    return norm.process_group or dist.group.WORLD
