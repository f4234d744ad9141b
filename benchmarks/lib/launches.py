"""What a network's training step launches on a GPU, found without one: op calls, and kernels."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget

from revbifpn_kernels.models.cost import fake_copy
from revbifpn_kernels.ops import last_program
from revbifpn_kernels.ops.launch import Launch

from .networks import LATTICE, fake_network
from .step import Step
from .workloads import LAYOUTS

Planned = tuple[Launch, dict[str, Any]]
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# Any target of NVIDIA: Triton specialises arguments alike for all of them.
_TARGET = GPUTarget("cuda", 90, 32)
# Autograd refuses CUDA tensors where there is no GPU, so those on the CPU say that they are.
_IS_ON_GPU = {"is_cpu": property(lambda _: False), "is_cuda": property(lambda _: True)}


@dataclass(frozen=True)
class Spec:
    """How a tensor lies in memory."""

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
        """Such a tensor, uninitialised."""
        storage = torch.empty(self.elements, dtype=self.dtype, device=device)
        return storage.as_strided(self.shape, self.strides, self.offset)


class OpCall(NamedTuple):
    """An op of ours with its arguments, where tensors are given as what a launch depends on."""

    op: str
    arguments: tuple

    def launches(self) -> list[Planned]:
        """What the op launches on a GPU, with meta tensors as operands."""
        planned: list[Planned] = []

        def record(launch: Launch, device: torch.device, operands: dict[str, Any]) -> None:
            if 0 not in launch.grid:
                planned.append((launch, tree_map_only(Tensor, Spec.of, operands)))

        with (
            FakeTensorMode(),
            mock.patch.multiple(FakeTensor, create=True, **_IS_ON_GPU),
            mock.patch.object(Launch, "run", record),
            mock.patch.dict(last_program._kept, clear=True),  # kept, fake ones would outlive this
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
    model_name: str,
    batch: int,
    side: int,
    autocast: torch.dtype | None = None,
    layout: str = "nchw",
    reversible: bool = True,
    *,
    is_exact: bool = False,
) -> list[OpCall]:
    """All calls of forward and backward, in order, on images of side × side pixels.

    With `is_exact` the network is the reversible one in exact mode.
    """
    net = fake_network(model_name, "reversible" if reversible or is_exact else "stored")
    if is_exact:
        net.lattice = LATTICE
    with (
        FakeTensorMode() as fakes,
        mock.patch.multiple(FakeTensor, create=True, **_IS_ON_GPU),
        _Calls() as recorder,
    ):
        image = torch.empty(batch, 3, side, side).to(memory_format=LAYOUTS[layout])
        Step(fake_copy(net, fakes), image, autocast).forward().backward()
    return recorder.calls


def distinct_launches(calls: list[OpCall]) -> Iterator[Planned]:
    """A launch and its operands for each kernel that Triton compiles: launches that differ in sizes
    alone share one, and the first is yielded."""
    kernels = set()
    for call in {str(call): call for call in calls}.values():
        for launch, operands in call.launches():
            kernel = kernel_key(launch, operands)
            if kernel not in kernels:
                kernels.add(kernel)
                yield launch, operands


def kernel_key(launch: Launch, operands: dict[str, Any]) -> tuple[str, str]:
    """Equal for launches that share a compiled kernel."""
    source, options = launch.source(_TARGET, operands)
    return source.hash(), str(options)
