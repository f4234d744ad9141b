"""A kernel launch as an object: planned once per geometry, run often, or compiled for any GPU."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from .compiled import (
    Compiled,
    has_launch_hooks,
    specialised_on,
)


class _Lists(threading.local):
    def __init__(self) -> None:
        self.lists: list[list] = []


_listening = _Lists()


@contextlib.contextmanager
def listed_launches() -> Iterator[list[tuple[Compiled | None, dict[str, Any]]]]:
    """Yields a list that gets each launch of this thread: its `Compiled` or None, its operands."""
    listed: list[tuple[Compiled | None, dict[str, Any]]] = []
    _listening.lists.append(listed)
    try:
        yield listed
    finally:
        _listening.lists.pop()


@functools.cache
def _warp_size() -> int:
    """Threads per warp of the current GPU; the interpreter, without a GPU, ignores the number."""
    if not torch.cuda.is_available():
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


@dataclass(frozen=True)
class Launch:
    """A Triton kernel with its grid, size arguments and compile-time constants.

    Its operands, the tensors and numbers that change from call to call, come with each run.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    # Threads per program; by default one per lane.
    threads: int | None = None
    # Keys: driver, device, the operands' names, and what Triton specialises a kernel on.
    compiled: dict[tuple, Compiled | None] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def options(self, warp_size: int) -> dict[str, Any]:
        """Compiler options; contraction is off because the kernels write each `fma` themselves."""
        threads = self.threads or self.constants["BLOCK"]
        return {"num_warps": threads // warp_size, "enable_fp_fusion": False}

    def run(self, device: torch.device, operands: dict[str, Any]) -> None:
        """Enqueue the kernel on `device`'s current stream."""
        compiled = self._run(device, operands)
        for listed in _listening.lists:
            listed.append((compiled, operands))

    def _run(self, device: torch.device, operands: dict[str, Any]) -> Compiled | None:
        """The kernel that was enqueued, if it can be without Triton's Python."""
        if 0 in self.grid:
            return None
        if not isinstance(self.kernel, JITFunction):  # interpreted
            self.run_by_triton(operands)
            return None
        active = driver.active
        current = active.get_current_device()
        if device.type == "cuda" and device.index != current:
            with torch.cuda.device(device):
                return self._run(device, operands)
        key = (active, current, *operands, *specialised_on(operands.values()))
        compiled = self.compiled.get(key)
        if compiled is not None and not has_launch_hooks():
            compiled.launch(active.get_current_stream(current), operands)
            return compiled
        kernel, given = self.run_by_triton(operands)
        if key not in self.compiled:
            self.compiled[key] = Compiled.of(kernel, self.grid, operands, given)
        return self.compiled[key]

    def run_by_triton(self, operands: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Launch by `kernel[grid]`; return the kernel and all arguments that it got."""
        given = {**operands, **self.args, **self.constants}
        return self.kernel[self.grid](**given, **self.options(_warp_size())), given

    def compile(self, target: "triton.backends.compiler.GPUTarget", operands: dict[str, Any]):
        """Compile the kernel for `target` as Triton's launcher would for these operands."""
        source, options = self.source(target, operands)
        return triton.compile(source, target=target, options=options)

    def source(
        self, target: "triton.backends.compiler.GPUTarget", operands: dict[str, Any]
    ) -> tuple[ASTSource, dict[str, Any]]:
        """What `compile` compiles, specialised for these operands, and the compiler's options."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        given = {**operands, **self.args, **self.constants, **self.options(target.warp_size)}
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, given, *bind(**given)
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__


def launch_of(
    kernel: Any,
    grid: tuple[int, ...],
    args: dict[str, Any],
    constants: dict[str, Any],
    threads: int | None = None,
) -> Launch:
    """The `Launch` of these fields; equal ones give the same object, with its compiled kernels."""
    return _launch(kernel, grid, tuple(args.items()), tuple(constants.items()), threads)


@functools.lru_cache(maxsize=4096)
def _launch(kernel, grid, args, constants, threads) -> Launch:
    return Launch(kernel, grid, dict(args), dict(constants), threads)


def run_all(planned: Iterable[tuple[Launch, dict[str, Any]]], device: torch.device) -> None:
    """Enqueue launches with their operands one after the other."""
    for launch, operands in planned:
        launch.run(device, operands)
