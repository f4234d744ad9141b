"""The gradients of depthwise convolutions: of the input and of the weights."""

import pytest
import torch
from helpers import assert_as_accurate, same_bits

from revbifpn_kernels.ops.conv.depthwise import (
    depthwise_input_grad,
    depthwise_input_grad_reference,
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
# Every case in two dtypes, which take turns.
over_cases = pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[(k + j) % 4]) for k, case in enumerate(CASES) for j in (0, 1)]
)
LAST = torch.channels_last


def inputs(case: str, dtype: torch.dtype = torch.float32):
    """x, the result's gradient, the weight, and kernel, stride and padding."""
    shape, kernel, stride, padding = CASES[case]
    x = torch.randn(shape, dtype=torch.float64).to(dtype, memory_format=LAST)
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in shape[2:]]
    grad = torch.randn(*shape[:2], *sides, dtype=torch.float64).to(dtype, memory_format=LAST)
    weight = torch.randn(shape[1], 1, kernel, kernel, dtype=torch.float64).to(dtype)
    return x, grad, weight, (kernel, stride, padding)


def input_grad(grad, weight, x, sizes):
    _, stride, padding = sizes
    return depthwise_input_grad(grad, weight, tuple(x.shape[2:]), stride=stride, padding=padding)


def weight_grad(x, grad, sizes):
    kernel, stride, padding = sizes
    return depthwise_weight_grad(x, grad, kernel_size=kernel, stride=stride, padding=padding)


@over_cases
def test_as_accurate_as_pytorch(case, dtype):
    x, grad, weight, sizes = inputs(case, dtype)
    of_input, of_weight = input_grad(grad, weight, x, sizes), weight_grad(x, grad, sizes)
    assert of_input.is_contiguous(memory_format=LAST)
    if len(x) == 0:
        assert of_input.shape == x.shape
        assert torch.equal(of_weight, torch.zeros_like(weight))
        return

    def references(x, grad, weight):
        of_input = depthwise_input_grad_reference(grad, weight, tuple(x.shape[2:]), *sizes[1:])
        return of_input, depthwise_weight_grad_reference(x, grad, *sizes)

    assert_as_accurate((of_input, of_weight), references, x, grad, weight)


def test_places_that_no_tap_reaches():
    """With strides beyond the kernel, and rows at the end that the last place leaves out."""
    grad = torch.randn(1, 16, 2, 3).to(memory_format=LAST)
    weight = torch.randn(16, 1, 2, 2)
    ours = depthwise_input_grad(grad, weight, (9, 13), stride=5)
    assert_as_accurate(
        ours, lambda g, w: depthwise_input_grad_reference(g, w, (9, 13), 5, 0), grad, weight
    )
    assert (ours[:, :, 2:5] == 0).all() and (ours[:, :, 7:] == 0).all()


def laid_out(maps, layout):
    if layout == "contiguous":
        return maps.contiguous()
    if layout == "strided":
        return maps.repeat_interleave(2, dim=3)[..., ::2]
    N, C, H, W = maps.shape
    whole = torch.randn(N, C + 16, H, W).to(memory_format=LAST)
    whole[:, 8 : 8 + C] = maps
    return whole[:, 8 : 8 + C]


@pytest.mark.parametrize("layout", ["contiguous", "slice", "strided"])
@pytest.mark.parametrize("case", ["tail of channels", "stride 8"])
def test_layouts_give_the_same_bits(case, layout):
    x, grad, weight, sizes = inputs(case)
    expected = input_grad(grad, weight, x, sizes), weight_grad(x, grad, sizes)
    x, grad = laid_out(x, layout), laid_out(grad, layout)
    if layout == "strided":
        weight = weight.mT.contiguous().mT
    assert same_bits((input_grad(grad, weight, x, sizes), weight_grad(x, grad, sizes)), expected)


def test_any_number_of_threads_gives_the_same_bits():
    x, grad, weight, sizes = inputs("stride 4")
    x, grad = (t.repeat(4, 4, 1, 1).contiguous(memory_format=LAST) for t in (x, grad))
    weight = weight.repeat(4, 1, 1, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((weight_grad(x, grad, sizes), input_grad(grad, weight, x, sizes)))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results)


def test_opcheck():
    x, grad, weight, sizes = inputs("stride 4")
    ops = torch.ops.revbifpn
    torch.library.opcheck(ops.depthwise_weight_grad.default, (x, grad, *sizes))
    sides = tuple(x.shape[2:])
    torch.library.opcheck(ops.depthwise_input_grad.default, (grad, weight, *sides, *sizes[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \(N, C, H, W\)"),
        ({"grad": torch.zeros(2, 3, 8, 8)}, r"grad must have shape \(2, 16, 9, 9\)"),
        ({"grad": torch.zeros(2, 16, 9, 9).double()}, ".* dtype torch.float32, got .*float64"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
    ],
)
def test_weight_grad_errors(change, message):
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
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 3, 4)}, r"grad must have shape \(N, C, H, W\)"),
        ({"grad": torch.zeros(2, 16, 8, 8)}, r"grad must have sides \(9, 9\)"),
        ({"weight": torch.zeros(16, 2, 5, 5)}, r"weight must have \(\(16, 1, 5, 5\)"),
        ({"weight": torch.zeros(16, 1, 5, 5).double()}, ".*got .*torch.float64"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
    ],
)
def test_input_grad_errors(change, message):
    arguments = {
        "grad": torch.zeros(2, 16, 9, 9),
        "weight": torch.zeros(16, 1, 5, 5),
        "size": (9, 9),
        "stride": 1,
        "padding": 2,
    } | change
    with pytest.raises((ValueError, TypeError), match=f"depthwise_input_grad: {message}"):
        depthwise_input_grad(**arguments)


@pytest.mark.parametrize(
    ("kernel", "stride", "message"),
    [(8, 2**63 - 3, "all below 2\\^31"), (3, 1, "grad must have the sides")],
)
def test_weight_grad_reads_no_foreign_memory(kernel, stride, message):
    """The dispatcher op, called directly, passes no check in Python."""
    x, grad = (torch.zeros(1, 16, 4, w).to(memory_format=torch.channels_last) for w in (4, 3))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.revbifpn.depthwise_weight_grad(x, grad, kernel, stride, 0)


def test_input_grad_reads_no_foreign_memory():
    grad = torch.zeros(1, 16, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="grad must have the sides"):
        torch.ops.revbifpn.depthwise_input_grad(grad, torch.zeros(16, 1, 3, 3), 5, 4, 1, 1)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        torch.ops.revbifpn.depthwise_input_grad(grad, torch.zeros(8, 1, 3, 3), 4, 4, 1, 1)
