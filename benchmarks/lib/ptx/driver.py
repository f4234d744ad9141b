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
    """Knows which elements of tensors that came uninitialised have been written since.

    An operator of PyTorch that writes to one counts as having written all of its storage.
    """

    EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        # The tensors are kept, so that no other takes their address.
        self.known: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def of(self, tensor: torch.Tensor) -> np.ndarray | None:
        """Which elements of the tensor's storage were written; None: all of its own."""
        return self.known.get(_storage(tensor), (None, None))[1]

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        schema = function._schema
        if schema.name.removeprefix("aten::") in self.EMPTY:
            elements = result.untyped_storage().nbytes() // result.itemsize
            self.known[_storage(result)] = result, np.zeros(elements, bool)
        elif schema.is_mutable:
            for leaf in tree_leaves((arguments, keywords)):
                if isinstance(leaf, torch.Tensor):
                    self.known.pop(_storage(leaf), None)
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class EmulatedGpu:
    """What to do with each launch, and what was done.

    `blocks` chooses which blocks of a grid run; `edit` changes the PTX before it runs. A launch of
    more than `most_steps` instructions is taken for one that does not end.
    """

    counts_traffic: bool = False
    blocks: Callable[[int], Sequence[int]] | None = None
    edit: Callable[[str], str] | None = None
    most_steps: int = 2**24
    launches: list[Launched] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allocations = _Allocations()

    def launch(self, program: Program, metadata: Any, grid, triples) -> None:
        """Run a program on (name, type, value) of each of its arguments."""
        memory = GlobalMemory(program.threads)

        def address(name: str, tensor: torch.Tensor) -> int:
            return memory.add(tensor, name, self.allocations.of(tensor))

        arguments = _as_bits(program, triples, address)
        traffic = Traffic() if self.counts_traffic else None
        shared = metadata.shared
        machine = Machine(program, memory, arguments, grid, shared, traffic, self.most_steps)
        machine.run(self.blocks(int(np.prod(grid))) if self.blocks else None)
        self.launches.append(Launched(program.name, program, metadata, grid, traffic))

    def written(self, tensor: torch.Tensor) -> torch.Tensor:
        """Which elements of a tensor have been written since it was allocated."""
        known = self.allocations.of(tensor)
        if known is None:
            return torch.ones(tensor.shape, dtype=torch.bool)
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return torch.from_numpy(known).as_strided(*place).clone()


def count_traffic(kernel: Any, arguments: dict[str, Any], grid, blocks: Sequence[int]) -> Traffic:
    """That of some blocks of a kernel as Triton compiled it, on tensors that need no memory."""
    program, memory, traffic = _parsed(kernel.asm["ptx"]), NoMemory(), Traffic()
    signature = kernel.src.signature
    given = [arguments[name] for name in signature]
    triples = _flatten(tuple(signature), tuple(signature.values()), given)
    bits = _as_bits(program, triples, lambda name, tensor: memory.add(tensor, name, None))
    sides = (*grid, 1, 1)[:3]
    Machine(program, memory, bits, sides, kernel.metadata.shared, traffic).run(blocks)
    return traffic


def _as_bits(
    program: Program, triples, address: Callable[[str, torch.Tensor], int]
) -> list[np.ndarray]:
    """A program's parameters; the last ones, scratch memory, are not used."""
    values = []
    for name, kind, value in triples:
        if kind.startswith("*"):
            values.append(address(name, value))
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


def _flatten(
    names: Sequence[str], signature: Sequence, arguments: Sequence
) -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of each argument that a compiled kernel takes; tuples in place."""
    for name, kind, value in zip(names, signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten([f"{name}[{k}]" for k in range(len(kind))], kind, value)
        elif kind != "constexpr":
            yield name, kind, value


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
        names, kinds = tuple(source.signature), tuple(source.signature.values())

        # Named as in Triton's launchers, by which the library knows their interface.
        def launch(gridX, gridY, gridZ, stream, function, packed, metadata_, enter, leave, *values):
            program = _parsed(self.gpu.edit(function) if self.gpu.edit else function)
            triples = _flatten(names, kinds, values)
            self.gpu.launch(program, metadata, (gridX, gridY, gridZ), triples)

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


_driver = functools.cache(_Driver)


@contextlib.contextmanager
def emulated_gpu(**options: Any) -> Iterator[EmulatedGpu]:
    """Inside, kernels launched on CPU tensors run as the PTX compiled for sm_90.

    Takes the fields of `EmulatedGpu`. Raises `Fault` where a GPU would trap, race, or read from a
    tensor that was allocated inside what neither a kernel nor PyTorch has written.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("emulated_gpu needs compiled kernels: unset TRITON_INTERPRET")
    driver, gpu = _driver(), EmulatedGpu(**options)
    knobs.runtime.kernel_load_start_hook.add(driver.utils.keep_ptx)
    before, driver_in_use._active, driver.gpu = (driver_in_use._active, driver.gpu), driver, gpu
    try:
        with gpu.allocations:
            yield gpu
    finally:
        driver_in_use._active, driver.gpu = before
        knobs.runtime.kernel_load_start_hook.remove(driver.utils.keep_ptx)
