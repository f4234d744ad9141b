"""How a kernel is launched: what reaches Triton's launcher, and when it has to be compiled anew."""

import contextlib
import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from helpers import needs_emulation, same_bits
from launchers import calls_of_triton, launchers_made_by, recorded_launches
from triton import knobs
from triton.runtime.driver import driver

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops import compiled
from revbifpn_kernels.ops.launch import Launch
from revbifpn_kernels.ops.resample.add import plan_resample_add, resample_add_reference

pytestmark = needs_emulation
CPU, SAME_DEVICE = torch.device("cpu"), 999
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


def test_the_launcher_gets_what_triton_gives_it():
    launch, operands = planned()
    with recorded_launches() as launches, calls_of_triton() as by_triton:
        launch.run_by_triton(operands)
        by_triton.clear()
        for _ in range(2):
            launch.run(CPU, operands)
    assert len(by_triton) == 1
    assert launches == launches[:1] * 3


def test_it_is_compiled_anew_for_other_alignments_and_dtypes():
    launch, aligned = planned()
    with emulated_gpu() as gpu, calls_of_triton() as by_triton:
        for operands in (aligned, planned(offset=1)[1], aligned, planned(offset=1)[1]):
            launch.run(CPU, operands)
            assert is_right(operands)
        assert len(by_triton) == 2 and len({run.program.name for run in gpu.launches}) == 1
        half, operands = planned(torch.float16)
        for dtype in (torch.float16, torch.bfloat16):
            as_dtype = {
                name: value.to(dtype) if isinstance(value, torch.Tensor) else value
                for name, value in operands.items()
            } | {"source_ptrs": tuple(s.to(dtype) for s in operands["source_ptrs"])}
            half.run(CPU, as_dtype)
            assert is_right(as_dtype)


def test_another_driver_gets_its_own_kernel():
    launch, operands = planned()
    for _ in range(2):
        with recorded_launches() as launches:
            driver.active.current = SAME_DEVICE
            launch.kernel.device_caches.pop(SAME_DEVICE, None)
            launch.run(CPU, operands)
            launch.run(CPU, operands)
        assert len(launches) == 2


def test_another_device_gets_its_own_kernel_on_its_stream():
    launch, operands = planned()
    with recorded_launches() as launches, calls_of_triton() as by_triton:
        first = driver.active.current
        for current in (first, first + 1) * 2:
            driver.active.current = current
            launch.run(CPU, operands)
    assert len(by_triton) == 2
    assert [stream for _, _, stream, *_ in launches] == [0, 1, 0, 1]


def test_it_runs_on_the_device_of_its_tensors(monkeypatch):
    launch, operands = planned()

    @contextlib.contextmanager
    def made_current(device):
        before, driver.active.current = driver.active.current, device.index
        yield
        driver.active.current = before

    monkeypatch.setattr(torch.cuda, "device", made_current)
    with recorded_launches() as launches:
        here = driver.active.current
        for index in (here, here + 1) * 2:
            launch.run(SimpleNamespace(type="cuda", index=index), operands)
            assert driver.active.current == here
    assert [stream for _, _, stream, *_ in launches] == [0, 1, 0, 1]


@triton.jit
def _scale_kernel(y_ptr, size, factor, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y_ptr + place, factor, place < size)


def test_it_is_compiled_anew_for_integers_but_not_for_fractions():
    launch = Launch(_scale_kernel, (1,), {}, {"BLOCK": 32})
    y = torch.empty(32)
    with recorded_launches() as launches, calls_of_triton() as by_triton:
        for size in (1, 5, 16, 5, 1):
            operands = {"y_ptr": y, "size": size, "factor": 0.5 * size}
            launch.run_by_triton(operands)
            by_triton.pop()
            launch.run(CPU, operands)
            launch.run(CPU, {**operands, "factor": 0.5})
    assert launches[::3] == launches[1::3]
    assert len(by_triton) == 3


def test_a_profilers_hook_sees_every_launch():
    launch, operands = planned()
    with emulated_gpu(), calls_of_triton() as by_triton:
        launch.run(CPU, operands)
        knobs.runtime.launch_enter_hook.add(print)
        try:
            launch.run(CPU, operands)
        finally:
            knobs.runtime.launch_enter_hook.remove(print)
        launch.run(CPU, operands)
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
        with warnings.catch_warnings(record=True) as caught, calls_of_triton() as by_triton:
            warnings.simplefilter("always")
            for _ in range(2):
                launch.run(CPU, operands)
    assert len(by_triton) == len(launched) == 2
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and f"Triton {triton.__version__}" in messages[0]


def launcher_like_tritons(gridX, gridY, gridZ, stream, function):
    """Has the parameters that are known."""


def kernel_of(names, **target):
    return SimpleNamespace(
        metadata=SimpleNamespace(target=SimpleNamespace(**target)), function=0, packed_metadata=(),
        run=launcher_like_tritons, src=SimpleNamespace(fn=SimpleNamespace(arg_names=names)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [(kernel_of(["x"], backend="cuda"), "KeyError"), (kernel_of(["x"]), "backend"),
     (kernel_of([], backend="cuda"), "ValueError"), (SimpleNamespace(), "metadata")],
    ids=["more arguments", "no backend", "other arguments", "no metadata"],
)  # fmt: skip
def test_an_unknown_kernel_is_left_to_triton_with_a_warning(kernel, problem):
    compiled._warn_once.cache_clear()
    operands = [] if problem == "KeyError" else ["y"]
    with pytest.warns(UserWarning, match=problem):
        assert compiled.Compiled.of(kernel, (1,), operands, {}) is None


def test_the_same_bits_by_either_way():
    launch, operands = planned()
    with emulated_gpu():
        launch.run_by_triton(operands)
        first = operands["y_ptr"].clone()
        for _ in range(2):
            operands["y_ptr"].zero_()
            launch.run(CPU, operands)
            assert same_bits(operands["y_ptr"], first)
