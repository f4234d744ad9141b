"""Compiles the GPU kernels of a training step before its first run, in parallel, without a GPU.

Triton compiles each kernel when it is first launched, one after the other: a minute or more for a
network's first step. Here a step runs on fake tensors, which shows its launches. Then several
processes compile the kernels, and Triton's cache on disk keeps them for the real step. In order:

    calls_of_step        the calls of our operators in a step
    distinct_launches    the launches that these make, one per kernel to compile
    compile_ahead        compiles those kernels
"""

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget

from .models.cost import fake_copy
from .ops import last_program
from .ops.launch import Launch

Planned = tuple[Launch, dict[str, Any]]
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# To tell kernels apart any NVIDIA GPU will do: Triton specialises arguments alike for all of them.
_TARGET = GPUTarget("cuda", 90, 32)
# Autograd refuses CUDA tensors on a machine without a GPU, so fake CPU tensors pretend to be some.
_IS_ON_GPU = {"is_cpu": property(lambda _: False), "is_cuda": property(lambda _: True)}


@dataclass(frozen=True)
class Spec:
    """What a launch depends on of a tensor: its dtype, and how it lies in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    elements: int  # of its storage

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        elements = tensor.untyped_storage().nbytes() // tensor.itemsize
        where = tensor.stride(), tensor.storage_offset(), elements
        return cls(tensor.dtype, tuple(tensor.shape), *where)

    def on(self, device: str) -> Tensor:
        """An uninitialised tensor of this kind."""
        storage = torch.empty(self.elements, dtype=self.dtype, device=device)
        return storage.as_strided(self.shape, self.strides, self.offset)


class OpCall(NamedTuple):
    """A call of one of our operators; a `Spec` takes the place of each tensor."""

    op: str
    arguments: tuple

    def launches(self) -> list[Planned]:
        """The launches that the operator makes on a GPU, with meta tensors as operands."""
        planned: list[Planned] = []

        def record(launch: Launch, device: torch.device, operands: dict[str, Any]) -> None:
            if 0 not in launch.grid:
                planned.append((launch, tree_map_only(Tensor, Spec.of, operands)))

        with (
            FakeTensorMode(),
            mock.patch.multiple(FakeTensor, create=True, **_IS_ON_GPU),
            mock.patch.object(Launch, "run", record),
            mock.patch.dict(last_program._counters, clear=True),  # else it would keep fake counters
        ):
            arguments = tree_map_only(Spec, lambda spec: spec.on("cpu"), self.arguments)
            getattr(torch.ops.revbifpn, self.op).default.redispatch(_CUDA, *arguments)
        to_meta = functools.partial(tree_map_only, Spec, lambda spec: spec.on("meta"))
        return [(launch, to_meta(operands)) for launch, operands in planned]


class _Calls(TorchDispatchMode):
    """Lists the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "revbifpn":
            assert not kwargs, "our ops are called with positional arguments"
            name = func._schema.name.removeprefix("revbifpn::")
            self.calls.append(OpCall(name, tree_map_only(Tensor, Spec.of, args)))
        if func is torch.ops.aten.batch_norm_elemt.default:  # it has no fake
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def calls_of_step(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    *,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> list[OpCall]:
    """All calls of our operators in a training step of `model` on a batch of `shape`, in order.

    The model may be on any device, and does not change. The loss is made up from its outputs: a
    sum of mean squares.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with (
        FakeTensorMode() as fakes,
        mock.patch.multiple(FakeTensor, create=True, **_IS_ON_GPU),
        _Calls() as recorder,
        mock.patch.object(dist, "all_reduce"),  # of synchronised norms
    ):
        twin = fake_copy(model, fakes).train()
        image = torch.empty(shape).to(memory_format=layout)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            outputs = twin(image)
        sum(y.float().square().mean() for y in tree_leaves(outputs)).backward()
    return recorder.calls


def distinct_launches(calls: list[OpCall]) -> Iterator[tuple[OpCall, int]]:
    """For each kernel to compile: a call, and the index of the launch in it that needs the kernel.

    Launches that differ only in sizes may share a kernel.
    """
    kernels = set()
    for call in {str(call): call for call in calls}.values():
        for number, planned in enumerate(call.launches()):
            kernel = kernel_key(*planned)
            if kernel not in kernels:
                kernels.add(kernel)
                yield call, number


def kernel_key(launch: Launch, operands: dict[str, Any]) -> tuple[str, str]:
    """A key that is equal for launches that share a compiled kernel."""
    source, options = launch.source(_TARGET, operands)
    return source.hash(), str(options)


def compile_ahead(calls: list[OpCall], target: GPUTarget, *, shows_progress: bool = True) -> str:
    """Compile all kernels that `calls` launch, on all cores; skip those in Triton's cache.

    Returns a line with the number of kernels, the GPU, and the seconds it took.
    """
    start = time.perf_counter()
    jobs = list(distinct_launches(calls))
    # Not forked: this process may have started CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        waiting = [pool.submit(_compile, *job, target) for job in jobs]
        for done, job in enumerate(as_completed(waiting), 1):
            job.result()
            if shows_progress and sys.stderr.isatty():
                bar = "#" * (30 * done // len(jobs))
                end = "\n" if done == len(jobs) else ""
                print(f"\rGPU kernels: [{bar:30}] {done}/{len(jobs)}", end=end, file=sys.stderr)
    seconds = time.perf_counter() - start
    return f"{len(jobs)} kernels for {name_of(target)} ready after {seconds:.0f} s"


def _compile(call: OpCall, number: int, target: GPUTarget) -> None:
    launch, operands = call.launches()[number]
    launch.compile(target, operands)


def target_of(name: str | None) -> GPUTarget:
    """The GPU of this name, such as sm_90 or gfx942; for None, the current GPU.

    Raises:
        ValueError: There is no current GPU, or no GPU has this name.
    """
    if name is None:
        if not torch.cuda.is_available():
            raise ValueError("found no GPU to compile for: expected --target, such as sm_90")
        return triton.runtime.driver.active.get_current_target()
    if name.startswith("sm_") and name[3:].isdecimal():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"expected the name of a GPU, such as sm_90 or gfx942, got {name!r}")


def name_of(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
