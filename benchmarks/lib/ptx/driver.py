"""A GPU that is not there: Triton compiles for it and launches on it, and NumPy runs the PTX.

    with emulated_gpu() as gpu:
        kernel[grid](tensor, …)     # on CPU tensors
    gpu.launches                    # what ran

Only for what the library's launches need of a driver, on Triton 3.6 to 3.8.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as driver_in_use

from .machine import Machine
from .memory import GlobalMemory, NoMemory
from .program import Program, parse
from .traffic import Traffic

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES, MULTIPROCESSORS, MAX_THREADS = 232448, 132, 1024


@dataclass(frozen=True)
class Launched:
    """A launch that has run; `traffic` is None unless it was counted."""

    name: str
    program: Program
    metadata: Any
    grid: tuple[int, int, int]
    traffic: Traffic | None


class _Allocations(TorchDispatchMode):
    """Knows which storages came uninitialised from an allocation and were not written since."""

    EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        # The tensors are kept, so that no other takes their address.
        self.unwritten: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        schema = function._schema
        if schema.name.removeprefix("aten::") in self.EMPTY:
            self.unwritten[_storage(result)] = result
        elif schema.is_mutable:
            for leaf in tree_leaves((arguments, keywords)):
                if isinstance(leaf, torch.Tensor):
                    self.unwritten.pop(_storage(leaf), None)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class EmulatedGpu:
    """What to do with each launch, and what was done.

    `blocks` chooses which blocks of a grid run; `edit` changes the PTX before it runs.
    """

    counts_traffic: bool = False
    blocks: Callable[[int], Sequence[int]] | None = None
    edit: Callable[[str], str] | None = None
    launches: list[Launched] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allocations = _Allocations()

    def launch(self, program: Program, metadata: Any, grid, pairs) -> None:
        """Run a program on (type, value) pairs of its arguments."""
        memory, tensors = GlobalMemory(), []

        def address(tensor: torch.Tensor) -> int:
            tensors.append(tensor)
            return memory.add(tensor, _storage(tensor) not in self.allocations.unwritten)

        arguments = _as_bits(program, pairs, address)
        traffic = Traffic() if self.counts_traffic else None
        machine = Machine(program, memory, arguments, grid, metadata.shared, traffic)
        machine.run(self.blocks(int(np.prod(grid))) if self.blocks else None)
        for tensor in tensors:
            if memory.is_stored_to(tensor):
                self.allocations.unwritten.pop(_storage(tensor), None)
        self.launches.append(Launched(program.name, program, metadata, grid, traffic))


def count_traffic(kernel: Any, arguments: dict[str, Any], grid, blocks: Sequence[int]) -> Traffic:
    """That of some blocks of a kernel as Triton compiled it, on tensors that need no memory."""
    program, memory, traffic = _parsed(kernel.asm["ptx"]), NoMemory(), Traffic()
    signature = kernel.src.signature
    pairs = _flatten(tuple(signature.values()), [arguments[name] for name in signature])
    bits = _as_bits(program, pairs, lambda tensor: memory.add(tensor, True))
    sides = (*grid, 1, 1)[:3]
    Machine(program, memory, bits, sides, kernel.metadata.shared, traffic).run(blocks)
    return traffic


def _as_bits(program: Program, pairs, address: Callable[[torch.Tensor], int]) -> list[np.ndarray]:
    """A program's parameters; the last ones, scratch memory, are not used."""
    values = []
    for kind, value in pairs:
        if kind.startswith("*"):
            values.append(address(value))
        elif kind == "fp32":
            values.append(int(np.float32(value).view(np.uint32)))
        else:
            values.append(_checked_integer(kind, value))
    values += [0] * (len(program.parameters) - len(values))
    return [
        np.array([value % 2**64], np.uint64).astype(np.uint64 if "64" in kind else np.uint32)
        for value, kind in zip(values, program.parameters, strict=True)
    ]


def _checked_integer(kind: str, value: int) -> int:
    bits = int(kind[1:])
    if kind[0] not in "iu" or not -(2 ** (bits - 1)) <= value < 2**bits:
        raise OverflowError(f"{value} as {kind}")
    return int(value)


def _flatten(signature: Sequence, arguments: Sequence) -> Iterator[tuple[str, Any]]:
    """(type, value) of each argument that a compiled kernel takes; tuples in place."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


@functools.cache
def _parsed(text: str) -> Program:
    return parse(text)


class _Utils:
    """What Triton asks of a driver's loader; a kernel's functions are its PTX, parsed later."""

    def get_device_properties(self, device):
        return {"max_shared_mem": MAX_SHARED_BYTES, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name, binary, shared_bytes, device):
        """(module, function, registers, spills, most threads): the function is the PTX."""
        return object(), self.ptx, 0, 0, MAX_THREADS

    def keep_ptx(self, module, function, name, files, hash_):
        """Called right before `load_binary`, which gets machine code alone."""
        self.ptx = Path(
            next(file for key, file in files.items() if key.endswith(".ptx"))
        ).read_text()


class _Driver(DriverBase):
    """Triton's driver while a GPU is emulated: one for all, because Triton caches its kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = _Utils()
        self.gpu: EmulatedGpu | None = None

    def launcher_cls(self, source, metadata):
        kinds = tuple(source.signature.values())

        def launch(x, y, z, stream, ptx, packed, launch_metadata, enter, leave, *arguments):
            text = self.gpu.edit(ptx) if self.gpu.edit else ptx
            self.gpu.launch(_parsed(text), metadata, (x, y, z), _flatten(kinds, arguments))

        return launch

    @classmethod
    def is_active(cls):
        return False  # never chosen, only set

    def map_python_to_cpp_type(self, kind):
        raise NotImplementedError

    def get_current_target(self):
        return TARGET

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return "emulated"

    def get_current_stream(self, device):
        return 0


@functools.cache
def _driver() -> _Driver:
    driver = _Driver()
    knobs.runtime.kernel_load_start_hook.add(driver.utils.keep_ptx)
    return driver


@contextlib.contextmanager
def emulated_gpu(**options: Any) -> Iterator[EmulatedGpu]:
    """Inside, kernels launched on CPU tensors run as the PTX compiled for sm_90.

    Takes the fields of `EmulatedGpu`. Raises `Fault` where a GPU would trap, race or read what
    nobody wrote.
    """
    driver, gpu = _driver(), EmulatedGpu(**options)
    before, driver_in_use._active, driver.gpu = (driver_in_use._active, driver.gpu), driver, gpu
    try:
        with gpu.allocations:
            yield gpu
    finally:
        driver_in_use._active, driver.gpu = before
