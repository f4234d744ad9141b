"""Recorded implementations: what is repeated, what is recorded anew, what cannot be repeated."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import needs_emulation
from launchers import recorded_launches
from triton import knobs

from revbifpn_kernels.ops.launch import launch_of
from revbifpn_kernels.ops.recorded import SPACING, Recorded

pytestmark = needs_emulation
CPU = torch.device("cpu")


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


def recorded(implementation):
    """The implementation, to be repeated, and a list of its calls."""
    calls = []

    def counted(x):
        calls.append(x)
        return implementation(x)

    return Recorded(counted, lambda tensors: list(tensors), CPU), calls


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


def returns_its_input(x):
    copy(torch.empty_like(x), x)
    return x


def copies(x):
    y = torch.empty_like(x)
    copy(y, x)
    return y.clone()


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
    [returns_its_input, copies, reads_another, launches_nothing, returns_a_part],
)
def test_what_does_more_is_called_every_time(implementation):
    call, calls = recorded(implementation)
    with recorded_launches():
        for k in range(3):
            call((torch.randn(8),))
            assert len(calls) == k + 1
