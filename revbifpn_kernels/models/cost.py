"""Counts a model's multiply-adds and the memory of a training step, without running it."""

import copy
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..mbconv.modules import SqueezeExcite
from ..silo import RevSilo
from .checks import whole
from .revbifpn import RevBiFPN
from .sizes import MIN_SIDE


class Macs(NamedTuple):
    """Operations of one forward in evaluation.

    Attributes:
        multiply_adds: Of convolutions and linear layers.
        biases: Additions of the biases in squeeze-excite.
        normalised: Elements that batch norms return.
        enlarged: Elements of the maps that silos enlarge, at the target's size.
    """

    multiply_adds: int
    biases: int
    normalised: int
    enlarged: int

    @property
    def official(self) -> int:
        """The number that the authors publish. `thop` counts 2 per element of a batch norm, 11 per
        element of a bilinear enlargement, and the biases of convolutions but not of linear layers.
        """
        return self.multiply_adds + self.biases + 2 * self.normalised + 11 * self.enlarged


class Memory(NamedTuple):
    """Bytes of a training step on top of parameters and their gradients.

    Attributes:
        held: Allocated between forward and backward.
        peak: The most that is allocated at a time.
    """

    held: int
    peak: int


def macs(model: RevBiFPN, side: int | None = None) -> Macs:
    """Count the operations on one image of `side` pixels (`config.resolution` unless given)."""
    side = model.config.resolution if side is None else whole("macs", "side", side, MIN_SIDE)
    counts = dict.fromkeys(Macs._fields, 0)
    with FakeTensorMode() as fakes, torch.no_grad():
        twin = fake_copy(model, fakes).eval()
        for module in twin.modules():
            if isinstance(module, SqueezeExcite | nn.Conv2d | nn.Linear | nn.BatchNorm2d | RevSilo):
                module.register_forward_hook(lambda *call: _count(counts, *call))
        twin(torch.empty(1, model.config.in_chans, side, side))
    return Macs(**counts)


def _count(counts: dict[str, int], module: nn.Module, args: tuple, output) -> None:
    if isinstance(module, RevSilo):
        edges = (key.split("_") for key in module.up)
        counts["enlarged"] += sum(output[int(target)].numel() for _, target in edges)
    elif isinstance(module, nn.BatchNorm2d):
        counts["normalised"] += output.numel()
    elif isinstance(module, SqueezeExcite):  # it applies its convolutions as matrix products
        for conv in (module.reduce, module.expand):
            counts["multiply_adds"] += conv.weight.numel()
            counts["biases"] += conv.bias.numel()
    elif isinstance(module, nn.Linear):
        counts["multiply_adds"] += module.weight.numel()
    else:
        counts["multiply_adds"] += output[0, 0].numel() * module.weight.numel()


def training_memory(
    model: nn.Module, shape: tuple[int, int, int, int], *, autocast: torch.dtype | None = None
) -> Memory:
    """Count the memory of a training step on a batch of `shape`, allocation by allocation.

    The step runs on fake tensors: no arithmetic, seconds for the largest model. The loss is the sum
    of all outputs. Memory that libraries use inside an operator (workspaces) is not counted. The
    model may be any module that maps such a batch to tensors, and does not change.
    """
    with FakeTensorMode() as fakes:
        twin = fake_copy(model, fakes).train()
        image = torch.empty(shape, dtype=next(twin.parameters()).dtype)
        for parameter in twin.parameters():
            parameter.grad = torch.empty_like(parameter)
        with _Allocations() as allocations:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs = twin(image)
            loss = sum(y.sum() for y in tree_leaves(outputs))
            del outputs
            held = allocations.now
            if loss.requires_grad:  # false for a frozen model
                loss.backward()
    return Memory(held, allocations.peak)


def fake_copy(model: nn.Module, fakes: FakeTensorMode) -> nn.Module:
    """Return a copy on fake CPU tensors; without forward hooks, because users' must not see it."""
    with fakes:
        memo = {id(t): torch.empty(t.shape, dtype=t.dtype) for t in model.buffers()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # forward pre-hooks stay: pruning computes weights there
    return twin


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operators have allocated and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._alive:
                self._alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(tree) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
