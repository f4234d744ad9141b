"""Recorded implementations: what is repeated, what is recorded anew, what cannot be repeated."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from helpers import needs_emulation, same_bits
from launchers import recorded_launches
from triton import knobs
from triton.runtime.driver import driver

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops.launch import _launch, launch_of
from revbifpn_kernels.ops.norm_act.factors import norm_factors_cuda
from revbifpn_kernels.ops.norm_act.forward import _norm_act_cuda
from revbifpn_kernels.ops.recorded import SPACING, Recorded

pytestmark = needs_emulation
CPU, SAME_DEVICE = torch.device("cpu"), 999


@triton.jit
def _copy_kernel(y_ptr, x_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place, place < size), place < size)


def copy(y, x):
    launch_of(_copy_kernel, (1,), {"size": x.numel()}, {"BLOCK": 128}).run(
        CPU, {"y_ptr": y, "x_ptr": x}
    )


def by_way_of_scratch(x):
    """Copies x by way of two scratch tensors, then their part that a view shows."""
    first, second = x.new_empty(3, len(x)), torch.empty_like(x)
    y, last = torch.empty_like(x), x.new_empty(1, 5)
    copy(first, x), copy(second, first), copy(y, second), copy(last, first[1])
    return y, [last[0]]


def addresses(launches):
    """What launchers were given for y_ptr and x_ptr."""
    return [tuple(values[:2]) for _, _, _, *values in launches]


def recorded(implementation, device=CPU):
    """The implementation, to be repeated, and a list of its calls."""
    calls = []

    def counted(x):
        calls.append(x)
        return implementation(x)

    return Recorded(counted, lambda tensors: list(tensors), device), calls


def test_memory_is_where_the_kernels_look_for_it():
    size, (call, _) = 77, recorded(by_way_of_scratch)
    with recorded_launches() as launches:
        for _ in range(3):
            x = torch.randn(size)
            launches.clear()
            y, (last,) = call((x,))
            found = addresses(launches)
            (first, _), (second, _), *_ = found
            row = first + size * 4
            assert found == [(first, x.data_ptr()), (second, first), (y.data_ptr(), second),
                             (last.data_ptr(), row)]  # fmt: skip
            assert y.shape == (size,) and last.shape == (5,)
        assert second - first == -(-3 * size * 4 // SPACING) * SPACING  # repeated: in one piece


def test_any_alignment_and_driver_is_repeated_as_it_was_called():
    (call, calls), x = recorded(by_way_of_scratch), torch.randn(78)
    for _ in range(2):
        with recorded_launches() as launches:
            driver.active.current = SAME_DEVICE
            _copy_kernel.device_caches.pop(SAME_DEVICE, None)
            for given in (x[1:], x[:77], x[:77], x[1:], x[:77]):
                call((given,))
        kernels = [kernel for kernel, *_ in launches]
        odd, first, *others = (kernels[k : k + 4] for k in range(0, 20, 4))
        assert others == [first, odd, first] and odd != first
        assert len(calls) == 3
        calls.clear()


def test_hooks_see_every_launch():
    call, calls = recorded(by_way_of_scratch)
    with recorded_launches():
        call((torch.randn(8),)), call((torch.randn(8),))
        assert len(calls) == 1
        knobs.runtime.launch_enter_hook.add(print)
        try:
            call((torch.randn(8),))
        finally:
            knobs.runtime.launch_enter_hook.remove(print)
        assert len(calls) == 2
        call((torch.randn(8),))
    assert len(calls) == 2


def test_each_device_is_recorded_by_itself():
    call, calls = recorded(by_way_of_scratch)
    with recorded_launches() as launches:
        first = driver.active.current
        for step, place in enumerate((0, 0, 1, 1, 0)):
            driver.active.current = first + place
            call((torch.randn(8),))
            assert len(calls) == (1, 1, 2, 2, 3)[step]
    assert [stream for _, _, stream, *_ in launches[::4]] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("place", [0, 1])
def test_another_device_than_the_current_one_is_left_to_the_launches(place):
    with recorded_launches():
        device = SimpleNamespace(index=driver.active.current + place)
        call, calls = recorded(by_way_of_scratch, device)
        for _ in range(3):
            call((torch.randn(8),))
    assert len(calls) == (1, 3)[place]


def test_kernels_live_as_long_as_they_are_repeated():
    call, _ = recorded(by_way_of_scratch)
    with recorded_launches():
        call((torch.randn(8),))
        of_triton, *_ = _copy_kernel.device_caches[driver.active.current]
        kernels = [weakref.ref(kernel) for kernel in of_triton.values()]
    of_triton.clear(), _launch.cache_clear(), gc.collect()
    assert kernels and all(kernel() is not None for kernel in kernels)
    del call
    gc.collect()
    assert not any(kernel() is not None for kernel in kernels)


def test_factors_that_no_kernel_can_read_are_copied_in_every_call():
    act = Recorded(_norm_act_cuda, lambda tensors: [*tensors, "silu"], CPU)
    factors = Recorded(norm_factors_cuda, lambda tensors: [*tensors, 2], CPU)
    with emulated_gpu():
        for _ in range(3):
            x, gate = torch.randn(2, 6, 8, 8)[:, ::2], torch.rand(2, 6)[:, ::2]
            norm, kept = [torch.rand(6)[::2] for _ in range(4)], torch.rand(4)[::2]
            dense = [values.contiguous() for values in norm]
            wanted = _norm_act_cuda(x.contiguous(), *dense, gate.contiguous(), "silu")
            assert same_bits(act([x, *norm, gate]), wanted)
            wanted = norm_factors_cuda(*dense, kept.contiguous(), 2)
            assert same_bits(factors([*norm, kept]), wanted)


def returns_its_input(x):
    copy(torch.empty_like(x), x)
    return x


def copies(x):
    y = torch.empty_like(x)
    copy(y, x)
    return y.clone()


def changes_its_result(x):
    y = torch.empty_like(x)
    copy(y, x)
    return y.add_(1)


def reads_another(x):
    y = torch.empty_like(x)
    copy(y, ANOTHER)
    return y


def launches_nothing(x):
    launch_of(_copy_kernel, (0,), {"size": 0}, {"BLOCK": 128}).run(CPU, {"y_ptr": x, "x_ptr": x})
    return torch.empty_like(x)


def returns_a_part(x):
    y = torch.empty_like(x)
    copy(y, x)
    return y[:4]


ANOTHER = torch.randn(8)


@pytest.mark.parametrize(
    "implementation",
    [returns_its_input, copies, changes_its_result, reads_another, launches_nothing,
     returns_a_part],
)  # fmt: skip
def test_what_does_more_is_called_every_time(implementation):
    call, calls = recorded(implementation)
    with recorded_launches():
        for k in range(3):
            call((torch.randn(8),))
            assert len(calls) == k + 1
