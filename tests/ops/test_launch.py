"""How a kernel is launched: what reaches Triton's launcher, and when it has to be compiled anew."""

import contextlib
import dataclasses
import warnings

import pytest
import torch
import triton
from helpers import needs_emulation, same_bits
from launchers import launchers_made_by, recorded_launches
from triton import knobs

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops import compiled
from revbifpn_kernels.ops.resample.add import plan_resample_add, resample_add_reference

pytestmark = needs_emulation
OPTIONS = (0.5, "bilinear", None)


def planned(dtype=torch.float32, offset=0):
    """A fusion's launch with its operands; x starts `offset` elements into its storage."""
    x = torch.randn(2 * 3 * 8 * 8 + offset)[offset:].view(2, 3, 8, 8).to(dtype)
    sources = [torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 2, 2).to(dtype)]
    launch, operands = plan_resample_add(torch.empty_like(x), x, sources, [], [], *OPTIONS)
    return dataclasses.replace(launch), operands  # none that was compiled before


def is_right(operands):
    """Whether y is what the other operands say, in every bit of the first launch's kind."""
    x, sources = operands["x_ptr"], operands["source_ptrs"]
    wanted = resample_add_reference(x.double(), [s.double() for s in sources], alpha=0.5)
    return torch.allclose(operands["y_ptr"].double(), wanted, rtol=1e-2, atol=1e-2)


@contextlib.contextmanager
def calls_of_triton(launch):
    """Lists the launches that go through `kernel[grid]`."""
    calls, before = [], type(launch).run_by_triton

    def counted(self, operands):
        calls.append(self)
        return before(self, operands)

    type(launch).run_by_triton = counted
    try:
        yield calls
    finally:
        type(launch).run_by_triton = before


def test_the_launcher_gets_what_triton_gives_it():
    launch, operands = planned()
    with recorded_launches() as launches, calls_of_triton(launch) as by_triton:
        launch.run_by_triton(operands)
        by_triton.clear()
        for _ in range(2):
            launch.run(torch.device("cpu"), operands)
    assert len(by_triton) == 1
    assert launches == launches[:1] * 3


def test_it_is_compiled_anew_for_other_alignments_and_dtypes():
    launch, aligned = planned()
    with emulated_gpu() as gpu, calls_of_triton(launch) as by_triton:
        for operands in (aligned, planned(offset=1)[1], aligned, planned(offset=1)[1]):
            launch.run(torch.device("cpu"), operands)
            assert is_right(operands)
        assert len(by_triton) == 2 and len({run.program.name for run in gpu.launches}) == 1
        half, operands = planned(torch.float16)
        for dtype in (torch.float16, torch.bfloat16):
            as_dtype = {
                name: value.to(dtype) if isinstance(value, torch.Tensor) else value
                for name, value in operands.items()
            } | {"source_ptrs": tuple(s.to(dtype) for s in operands["source_ptrs"])}
            half.run(torch.device("cpu"), as_dtype)
            assert is_right(as_dtype)


def test_another_driver_gets_its_own_kernel():
    launch, operands = planned()
    for _ in range(2):
        with recorded_launches() as launches:
            launch.run(torch.device("cpu"), operands)
            launch.run(torch.device("cpu"), operands)
        assert len(launches) == 2


def test_a_profilers_hook_sees_every_launch():
    launch, operands = planned()
    with emulated_gpu(), calls_of_triton(launch) as by_triton:
        launch.run(torch.device("cpu"), operands)
        knobs.runtime.launch_enter_hook.add(print)
        try:
            launch.run(torch.device("cpu"), operands)
        finally:
            knobs.runtime.launch_enter_hook.remove(print)
        launch.run(torch.device("cpu"), operands)
    assert len(by_triton) == 2


@pytest.mark.parametrize("unknown", ["another order", "no signature"])
def test_an_unknown_launcher_is_left_to_triton_with_one_warning(unknown):
    launch, operands = planned()
    compiled._warn_once.cache_clear()
    launched = []

    def launcher(stream, gridX, *more):
        launched.append(gridX)

    if unknown == "no signature":
        launcher.__signature__ = "none"
    with launchers_made_by(lambda source, metadata: launcher):
        with warnings.catch_warnings(record=True) as caught, calls_of_triton(launch) as by_triton:
            warnings.simplefilter("always")
            for _ in range(2):
                launch.run(torch.device("cpu"), operands)
    assert len(by_triton) == len(launched) == 2
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and f"Triton {triton.__version__}" in messages[0]


def test_the_same_bits_by_either_way():
    launch, operands = planned()
    with emulated_gpu():
        launch.run_by_triton(operands)
        first = operands["y_ptr"].clone()
        for _ in range(2):
            operands["y_ptr"].zero_()
            launch.run(torch.device("cpu"), operands)
            assert same_bits(operands["y_ptr"], first)
