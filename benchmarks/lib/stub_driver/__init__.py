"""Triton's real launcher on a CUDA driver that does nothing: what a launch costs the host.

with stub_gpu() as launches:
    kernel[grid](tensor, …)     # on CPU tensors; compiled for sm_90, launched, never run
launches()                      # how many there were so far
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as driver_in_use

from ..record import ROOT

SOURCE = Path(__file__).with_name("driver.c")
FOLDER = ROOT / "build" / "stub_driver"
TARGET = GPUTarget("cuda", 90, 32)


@functools.cache
def _library() -> ctypes.CDLL:
    """libcuda.so.1, compiled on first use and after a change, loaded before Triton asks for it.

    It is made elsewhere and moved, because other processes may do the same or load it.
    """
    library, plain = FOLDER / "libcuda.so.1", FOLDER / "libcuda.so"
    is_old = not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime
    if is_old or not plain.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        command = ["cc", "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library.name}"]
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made, link = Path(folder, library.name), Path(folder, plain.name)
            subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True)
            link.symlink_to(library.name)
            os.replace(made, library)
            os.replace(link, plain)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _driver():
    from triton.backends.nvidia.driver import CudaDriver

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self):
            return TARGET

    knobs.nvidia.libcuda_path = str(FOLDER)
    return StubDriver()


@contextlib.contextmanager
def stub_gpu() -> Iterator[Callable[[], int]]:
    """Triton's active driver is one that does nothing; yields the count of launches."""
    if torch.cuda.is_available():
        raise RuntimeError("stub_gpu needs a machine without a GPU: its driver is in use")
    library = _library()
    library.stub_launches.restype = ctypes.c_long
    before, driver_in_use._active = driver_in_use._active, _driver()
    try:
        yield library.stub_launches
    finally:
        driver_in_use._active = before
