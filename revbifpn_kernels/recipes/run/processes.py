"""One process or many: torchrun's environment, DDP or FSDP2, and what all processes agree on.

After each step each process has the same weights, running statistics and step, so the first
process writes the checkpoint of all.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ...mbconv.synchronised import convert_sync_batchnorm
from ...models.revbifpn import RevBiFPN
from .errors import RunError

# Small, to reduce gradients during the backward: PyTorch's default of 25 MiB holds all of S0's.
BUCKET_MIB = 4


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        return self.device.index in (None, 0)

    def any(self, *flags: bool) -> list[bool]:
        """Returns whether each flag is set on any process; over gloo, without waiting for a GPU."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return raised.bool().tolist()

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value) -> list:
        """Returns each process' value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def device_of(kind: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda needs a GPU, found none")
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")


@contextlib.contextmanager
def joined(options) -> Iterator[World]:
    """The world that torchrun describes, or this process alone."""
    device = device_of(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if options.fsdp:
            raise RunError(
                "--fsdp needs processes to shard over: torchrun --nproc-per-node=2 -m "
                "revbifpn_kernels.train --fsdp …, got one process"
            )
        yield World(0, 1, device)
        return
    # A restart by torchrun may get the store of the run before, with that run's addresses.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        # Gloo's threads need the interpreter lock to drop the last collective's tensors;
        # destroying the group holds that lock and waits for the threads, for ever (torch 2.12).
        time.sleep(0.2)
        dist.destroy_process_group()


def synchronised(model: RevBiFPN, world: World) -> nn.Module:
    """Returns the model with batch norms that normalise all processes' images together."""
    return convert_sync_batchnorm(model) if world.size > 1 else model


def distributed(model: RevBiFPN, world: World, fsdp: bool) -> nn.Module:
    """Returns what a step calls: the model, sharded in place, or DDP around it."""
    if fsdp:
        return shard(model, world)
    if world.size == 1:
        return model
    # About 1×1 convolutions in channels_last, whose two strides describe the same layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_MIB,
    )


def shard(model: RevBiFPN, world: World) -> RevBiFPN:
    """Shards by FSDP2: each reversible block gathers its weights in forward and in backward."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*model.body, model.neck, model.head):
        if part is not None:
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def reducing(net: nn.Module, is_last: bool) -> Iterator[None]:
    """Accumulates gradients; reduces them over processes in a step's last micro-batch."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(is_last)
        yield
    elif isinstance(net, DistributedDataParallel) and not is_last:
        with net.no_sync():
            yield
    else:
        yield
