"""The Triton kernels that a network's training step launches on a GPU, found without a GPU."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget

from revbifpn_kernels.models.cost import fake_copy
from revbifpn_kernels.ops.launch import Launch

from .networks import LATTICE, fake_network
from .step import Step
from .workloads import LAYOUTS

Planned = tuple[Launch, dict[str, Any]]
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# Any: it decides how Triton specialises, and that is the same for all of its vendor.
_TARGET = GPUTarget("cuda", 90, 32)


class _OnCuda(TorchDispatchMode):
    """Sends our ops on fake tensors to their CUDA implementations instead of their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "revbifpn":
            return func.redispatch(_CUDA, *args, **(kwargs or {}))
        if func is torch.ops.aten.batch_norm_elemt.default:  # it has no fake
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def launches_of_step(
    model_name: str,
    batch: int,
    side: int,
    autocast: torch.dtype | None = None,
    layout: str = "nchw",
    reversible: bool = True,
    *,
    is_exact: bool = False,
) -> Iterator[Planned]:
    """Yield a launch and its operands for each kernel that Triton compiles for a training step.

    The step runs on fake tensors; operands are meta tensors with the strides and alignment of real
    ones. Launches that differ in sizes alone share a kernel: the first is yielded. With `is_exact`
    the network is the reversible one in exact mode.
    """
    provider = "reversible" if reversible or is_exact else "stored"
    net = fake_network(model_name, provider)
    if is_exact:
        net.lattice = LATTICE
    forms, kernels = set(), set()
    for launch, fakes in _launches(net, (batch, 3, side, side), autocast, layout):
        operands = tree_map_only(Tensor, _on_meta, fakes)
        if (form := _form(launch, operands)) in forms:
            continue
        forms.add(form)
        source, options = launch.source(_TARGET, operands)
        kernel = source.hash(), str(options)
        if kernel not in kernels:
            kernels.add(kernel)
            yield launch, operands


def _launches(
    net: nn.Module, shape: tuple[int, ...], autocast: torch.dtype | None, layout: str
) -> list[Planned]:
    """All launches of forward and backward, in order, with fake operands."""
    planned: list[Planned] = []

    def record(launch: Launch, device: torch.device, operands: dict[str, Any]) -> None:
        if 0 not in launch.grid:
            planned.append((launch, operands))

    # Autograd refuses CUDA tensors where there is no GPU, so those on the CPU say that they are.
    is_on_gpu = {"is_cpu": property(lambda _: False), "is_cuda": property(lambda _: True)}
    with (
        FakeTensorMode() as fakes,
        mock.patch.multiple(FakeTensor, create=True, **is_on_gpu),
        mock.patch.object(Launch, "run", record),
        _OnCuda(),
    ):
        image = torch.empty(shape).to(memory_format=LAYOUTS[layout])
        Step(fake_copy(net, fakes), image, autocast).forward().backward()
    return planned


def _form(launch: Launch, operands: dict[str, Any]) -> str:
    """Equal for launches that surely share a kernel: most of a step's, at a fraction of the time
    that `Launch.source` takes."""
    forms = tree_map_only(Tensor, lambda t: (t.dtype, t.data_ptr() % 16), operands)
    return f"{launch.kernel.__name__} {launch.args} {launch.constants} {launch.threads} {forms}"


def _on_meta(tensor: Tensor) -> Tensor:
    """The tensor without a fake mode, at the same offset: planning and compiling read no more."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    storage = torch.empty(size, dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
