"""Measures memory: exactly on CPUs, by the caching allocator on GPUs, counted on fake tensors."""

import gc
import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from revbifpn_kernels import training_memory

# The profiler would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
MIB = 2**20
FEW = 2  # images: a batch and twice that give the slope
COPIES = 3  # parameters, their gradients, the momentum of SGD


def held_and_peak(forward: Callable[[], torch.Tensor], device: str = "cpu") -> tuple[int, int]:
    """Bytes held between `forward` and the backward of the loss it returns, and the step's peak.

    Both on top of what was there before, with the gradients of parameters that the step makes; call
    it with those in place to leave them out.
    """
    if device == "cuda":
        before = _reset_peak()
        loss = forward()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return held, torch.cuda.max_memory_allocated() - before
    losses = []
    held = sum(_changes(lambda: losses.append(forward())))
    return held, max(itertools.accumulate(_changes(losses.pop().backward), initial=held))


def peak_mib(call: Callable[[], object], device: str) -> float:
    """The most memory that `call` takes on top of what was there."""
    if device == "cuda":
        before = _reset_peak()
        call()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    return max(itertools.accumulate(_changes(call), initial=0)) / MIB


def _reset_peak() -> int:
    """Begins a new peak of the GPU's allocator; returns the bytes that are allocated now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _changes(call: Callable[[], object]) -> list[int]:
    """Allocations (positive) and releases (negative) of the CPU's allocator, in bytes, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler says that it forgets between cycles
        gc.collect()  # what others left would be counted as released by `call`
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )


@dataclass(frozen=True)
class PerImage:
    """Bytes per image of a training step, and bytes that it takes whatever the batch."""

    held: float  # between forward and backward, per image
    peak: float  # at the worst moment, per image
    parameters: int
    constant: float  # parameters, gradients, momentum, and what the step itself needs besides

    def columns(self) -> dict[str, str]:
        """As columns of a row."""
        return {
            "held_mib": f"{self.held / MIB:.4f}",
            "peak_mib": f"{self.peak / MIB:.4f}",
            "parameters_mib": f"{self.parameters / MIB:.3f}",
            "constant_mib": f"{self.constant / MIB:.3f}",
        }


def per_image(
    net: nn.Module, side: int, autocast: torch.dtype | None = None, images: int = FEW
) -> PerImage:
    """Counted on fake tensors, of batches of `images` and twice as many."""
    few, twice = (
        training_memory(net, (n, 3, side, side), autocast=autocast) for n in (images, 2 * images)
    )
    return slope(net, few, twice, images)


def slope(
    net: nn.Module, few: tuple[int, int], twice: tuple[int, int], images: int = FEW
) -> PerImage:
    """From (held, peak) of a few and of twice as many images: what does not grow cancels."""
    parameters = sum(p.nbytes for p in net.parameters())
    held, peak = ((b - a) / images for a, b in zip(few, twice, strict=True))
    constant = COPIES * parameters + few[1] - images * peak
    return PerImage(held, peak, parameters, constant)
