"""Counts the memory of a training step: exactly on CPUs, by the caching allocator on GPUs."""

import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def held_and_peak(
    forward: Callable[[], torch.Tensor], device: str = "cpu", *, gradients: bool = True
) -> tuple[int, int]:
    """Bytes held between `forward` and the backward of the loss it returns, and the step's peak.

    Both on top of what was there before, with the gradients of parameters that the step makes; call
    it with those in place to leave them out. `gradients=False` measures the forward alone.
    """
    if device == "cuda":
        return _on_cuda(forward, gradients)
    loss = []
    trace = _changes(lambda: loss.append(forward()))
    held = peak = sum(trace)
    if gradients:
        total = held
        for change in _changes(loss.pop().backward):
            total += change
            peak = max(peak, total)
    return held, peak


def _on_cuda(forward: Callable[[], torch.Tensor], gradients: bool) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward()
    held = torch.cuda.memory_allocated() - before
    if gradients:
        loss.backward()
    del loss
    return held, torch.cuda.max_memory_allocated() - before


def _changes(call: Callable[[], object]) -> list[int]:
    """Allocations (positive) and releases (negative) of the CPU's allocator, in bytes, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler says that it forgets between cycles
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
