"""A driver of Triton whose launchers only note what they are given.

Its devices are two, `driver.active.current` and the next number; their streams are 0 and 1.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

from torch import Tensor
from triton.runtime.driver import driver

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops.launch import Launch

_numbers = itertools.count(1000, 2)  # of devices: Triton keeps what it compiled by them


@contextlib.contextmanager
def launchers_made_by(launcher_cls: Callable) -> Iterator[None]:
    """Inside, kernels are compiled for sm_90 and launched by what `launcher_cls` returns."""
    with emulated_gpu():
        another = copy.copy(driver.active)
    another.utils = copy.copy(another.utils)
    another.utils.ptx = "not run"
    another.launcher_cls = launcher_cls
    another.current = first = next(_numbers)
    another.get_current_device = lambda: another.current
    another.get_current_stream = lambda device: device - first
    with mock.patch.object(driver, "_active", another):
        yield


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[tuple]]:
    """Lists what launchers are given, less hooks and what they do not read; pointers as numbers."""
    launches = []

    def launcher_cls(source, metadata):
        is_read = [kind != "constexpr" for kind in source.signature.values()]

        def launch(gridX, gridY, gridZ, stream, function, packed, info, enter, leave, *values):
            read = [_bare(value) for value, is_ in zip(values, is_read, strict=True) if is_]
            name = source.fn.__name__
            grid, kernel = (gridX, gridY, gridZ), (name, str(source.attrs), function, packed)
            launches.append((kernel, grid, stream, *read))

        return launch

    with launchers_made_by(launcher_cls):
        yield launches


@contextlib.contextmanager
def calls_of_triton() -> Iterator[list[Launch]]:
    """Lists the launches that go through `kernel[grid]`."""
    calls, before = [], Launch.run_by_triton

    def counted(self, operands):
        calls.append(self)
        return before(self, operands)

    with mock.patch.object(Launch, "run_by_triton", counted):
        yield calls


def _bare(value):
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(_bare, value)) if isinstance(value, tuple) else value
