"""A driver of Triton whose launchers only note what they are given."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

from torch import Tensor
from triton.runtime.driver import driver

from benchmarks.lib.ptx import emulated_gpu


@contextlib.contextmanager
def launchers_made_by(launcher_cls: Callable) -> Iterator[None]:
    """Inside, kernels are compiled for sm_90 and launched by what `launcher_cls` returns."""
    with emulated_gpu():
        another = copy.copy(driver.active)
    another.utils = copy.copy(another.utils)
    another.utils.ptx = "not run"
    # Triton keeps what it compiled by device.
    another.launcher_cls, another.get_current_device = launcher_cls, lambda: id(another)
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


def _bare(value):
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(_bare, value)) if isinstance(value, tuple) else value
