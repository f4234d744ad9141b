"""A kernel launch as an object: planned once per geometry, run often, or compiled for any GPU."""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


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

    def options(self, warp_size: int) -> dict[str, Any]:
        """Compiler options; contraction is off because the kernels write each `fma` themselves."""
        threads = self.threads or self.constants["BLOCK"]
        return {"num_warps": threads // warp_size, "enable_fp_fusion": False}

    def run(self, device: torch.device, operands: dict[str, Any]) -> None:
        """Enqueue the kernel on `device`'s current stream."""
        if 0 in self.grid:
            return
        is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
        with contextlib.nullcontext() if is_current else torch.cuda.device(device):
            options = self.options(_warp_size())
            self.kernel[self.grid](**operands, **self.args, **self.constants, **options)

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


def run_all(planned: Iterable[tuple[Launch, dict[str, Any]]], device: torch.device) -> None:
    """Enqueue launches with their operands one after the other."""
    for launch, operands in planned:
        launch.run(device, operands)
