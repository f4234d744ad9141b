"""The weights' gradient of depthwise convolutions."""

import pytest
import torch
from helpers import assert_as_accurate, same_bits

from revbifpn_kernels.ops.conv.depthwise_weight_grad import (
    depthwise_weight_grad,
    depthwise_weight_grad_reference,
)

CASES = {  # (N, C, H, W), kernel, stride, padding
    "even": ((2, 32, 12, 12), 5, 1, 2),
    "odd": ((2, 16, 7, 9), 3, 1, 1),
    "tail of channels": ((2, 24, 10, 9), 5, 1, 2),
    "few channels": ((2, 5, 10, 9), 5, 1, 2),
    "one channel": ((1, 1, 8, 8), 5, 1, 2),
    "one pixel": ((3, 17, 1, 1), 5, 1, 2),
    "stride 2": ((2, 48, 14, 13), 3, 2, 1),
    "stride 4": ((2, 48, 15, 16), 7, 4, 3),
    "stride 8": ((2, 20, 24, 17), 15, 8, 7),
    "no padding": ((2, 16, 9, 9), 3, 1, 0),
    "one by one": ((2, 16, 9, 9), 1, 1, 0),
    "wide padding": ((2, 16, 3, 3), 3, 1, 4),
    "no image": ((0, 16, 9, 9), 5, 1, 2),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def maps(case: str, dtype: torch.dtype):
    shape, kernel, stride, padding = CASES[case]
    x = torch.randn(shape, dtype=torch.float64).to(dtype, memory_format=torch.channels_last)
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[2:]]
    grad = torch.randn(*shape[:2], *sides, dtype=torch.float64)
    return x, grad.to(dtype, memory_format=torch.channels_last), (kernel, stride, padding)


def ours(x, grad, sizes):
    kernel, stride, padding = sizes
    return depthwise_weight_grad(x, grad, kernel_size=kernel, stride=stride, padding=padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(case, dtype):
    x, grad, sizes = maps(case, dtype)
    if len(x) == 0:
        assert torch.equal(ours(x, grad, sizes), torch.zeros(16, 1, 5, 5, dtype=dtype))
        return

    def reference(x, grad):
        return depthwise_weight_grad_reference(x, grad, *sizes)

    assert_as_accurate(ours(x, grad, sizes), reference, x, grad)


@pytest.mark.parametrize("layout", ["contiguous", "slice", "strided"])
def test_layouts_give_the_same_bits(layout):
    x, grad, sizes = maps("tail of channels", torch.float32)
    expected = ours(x, grad, sizes)
    if layout == "contiguous":
        x, grad = x.contiguous(), grad.contiguous()
    elif layout == "slice":
        whole = torch.randn(2, 40, 10, 9).to(memory_format=torch.channels_last)
        whole[:, 8:32] = x
        x = whole[:, 8:32]
    else:
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    assert same_bits(ours(x, grad, sizes), expected)


def test_any_number_of_threads_gives_the_same_bits():
    x, grad, sizes = maps("stride 4", torch.float32)
    x, grad = (
        t.repeat(4, 4, 1, 1).contiguous(memory_format=torch.channels_last) for t in (x, grad)
    )
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ours(x, grad, sizes))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results)


def test_opcheck():
    x, grad, sizes = maps("even", torch.float32)
    torch.library.opcheck(torch.ops.revbifpn.depthwise_weight_grad.default, (x, grad, *sizes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \(N, C, H, W\)"),
        ({"grad": torch.zeros(2, 3, 8, 8)}, r"grad must have shape \(2, 16, 9, 9\)"),
        ({"grad": torch.zeros(2, 16, 9, 9).double()}, ".* dtype torch.float32, got .*float64"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
    ],
)
def test_errors(change, message):
    arguments = {
        "x": torch.zeros(2, 16, 9, 9),
        "grad": torch.zeros(2, 16, 9, 9),
        "kernel_size": 5,
        "stride": 1,
        "padding": 2,
    } | change
    with pytest.raises((ValueError, TypeError), match=f"depthwise_weight_grad: {message}"):
        depthwise_weight_grad(arguments.pop("x"), arguments.pop("grad"), **arguments)


@pytest.mark.parametrize(
    "kernel, stride, message",
    [(8, 2**63 - 3, "all below 2\\^31"), (3, 1, "grad must have the sides")],
)
def test_the_dispatcher_op_reads_no_foreign_memory(kernel, stride, message):
    """Called directly it meets no check of Python's."""
    x, grad = (torch.zeros(1, 16, 4, w).to(memory_format=torch.channels_last) for w in (4, 3))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.revbifpn.depthwise_weight_grad(x, grad, kernel, stride, 0)
