"""A compiled kernel, launched as Triton's launcher does below the Python of `kernel[grid](…)`.

Triton binds, specialises and looks up all arguments of a kernel at every call. Here that is done
for the few that change from call to call. Later calls ignore a kernel's own hooks
(`add_pre_run_hook`), and changes of Triton's knobs and of globals that the kernel reads. With hooks
of launches (`has_launch_hooks`), which profilers use, every call goes through Triton's Python.
"""

import functools
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.knobs import runtime

ALIGNMENT = 16  # bytes
# The parameters of a launcher of Triton 3.6 to 3.8 begin with these.
LEADING = ("gridX", "gridY", "gridZ", "stream", "function")
STREAM = LEADING.index("stream")
# Launch metadata (for hooks only), the hook before and the hook after a launch: none.
NO_HOOKS = (None, None, None)


def specialised_on(values: Iterable[Any]) -> list:
    """The properties of operands by which Triton chooses a kernel of a launch on NVIDIA's GPUs."""
    key: list = []
    for value in values:
        for leaf in value if isinstance(value, tuple) else (value,):
            if isinstance(leaf, Tensor):
                key += leaf.dtype, leaf.data_ptr() % ALIGNMENT == 0
            else:
                key.append(float if isinstance(leaf, float) else leaf)
    return key


def has_launch_hooks() -> bool:
    """Whether a profiler listens to launches by Triton's hooks."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one grid and one specialisation, loaded on one device."""

    launcher: Any
    frame: list  # the launcher's arguments, with gaps for operands and stream
    places: dict[str, int]  # of the operands in the frame
    kernel: Any  # Triton's, which owns the code that `frame` points to

    @classmethod
    def of(
        cls, kernel: Any, grid: tuple[int, ...], operands: Iterable[str], given: dict[str, Any]
    ) -> "Compiled | None":
        """What `kernel[grid](…)` returned for `given`, ready for others of the named operands.

        None where only Triton itself can launch it.
        """
        if kernel is None:
            return None
        try:
            if kernel.metadata.target.backend != "cuda":
                return None
            launcher, names = kernel.run, kernel.src.fn.arg_names
            parameters = tuple(inspect.signature(launcher).parameters)
            if parameters[: len(LEADING)] != LEADING:
                raise TypeError(f"its launcher takes {parameters}")
            sides, handles = (*grid, 1, 1)[:3], (kernel.function, kernel.packed_metadata)
            frame = [*sides, None, *handles, *NO_HOOKS]
            places = {name: len(frame) + names.index(name) for name in operands}
            frame += (None if name in places else given[name] for name in names)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            _warn_once(repr(problem))
            return None
        return cls(launcher, frame, places, kernel)

    def launch(self, stream: int, operands: dict[str, Any]) -> None:
        """Enqueue the kernel on a stream of the device."""
        frame = self.frame.copy()
        frame[STREAM] = stream
        for name, operand in operands.items():
            frame[self.places[name]] = operand
        self.launcher(*frame)


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"revbifpn_kernels: launches take the host several times as long as they could, because "
        f"Triton {triton.__version__} launches kernels in a way that is unknown here: {problem}",
        stacklevel=1,
    )
