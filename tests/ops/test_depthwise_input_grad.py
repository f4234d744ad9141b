"""The input's gradient of depthwise convolutions."""

import pytest
import torch
from helpers import assert_as_accurate, same_bits
from test_depthwise_weight_grad import CASES, DTYPES, maps

from revbifpn_kernels.ops.conv.depthwise_input_grad import (
    depthwise_input_grad,
    depthwise_input_grad_reference,
)


def inputs(case: str, dtype: torch.dtype):
    x, grad, (kernel, stride, padding) = maps(case, dtype)
    weight = torch.randn(x.shape[1], 1, kernel, kernel, dtype=torch.float64).to(dtype)
    return grad, weight, tuple(x.shape[2:]), {"stride": stride, "padding": padding}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_pytorch(case, dtype):
    grad, weight, size, sizes = inputs(case, dtype)
    ours = depthwise_input_grad(grad, weight, size, **sizes)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    if len(grad) == 0:
        assert ours.shape == (0, 16, *size)
        return

    def reference(grad, weight):
        return depthwise_input_grad_reference(grad, weight, size, **sizes)

    assert_as_accurate(ours, reference, grad, weight)


def test_places_that_no_tap_reaches():
    """With strides beyond the kernel, and rows at the end that the last place leaves out."""
    grad = torch.randn(1, 16, 2, 3).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, 2, 2)
    ours = depthwise_input_grad(grad, weight, (9, 13), stride=5)
    assert_as_accurate(
        ours, lambda g, w: depthwise_input_grad_reference(g, w, (9, 13), 5, 0), grad, weight
    )
    assert (ours[:, :, 2:5] == 0).all() and (ours[:, :, 7:] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "slice", "strided"])
def test_layouts_give_the_same_bits(layout):
    grad, weight, size, sizes = inputs("stride 8", torch.float32)
    expected = depthwise_input_grad(grad, weight, size, **sizes)
    if layout == "contiguous":
        grad = grad.contiguous()
    elif layout == "slice":
        whole = torch.randn(2, 40, *grad.shape[2:]).to(memory_format=torch.channels_last)
        whole[:, 8:28] = grad
        grad = whole[:, 8:28]
    else:
        grad = grad.repeat_interleave(2, dim=3)[..., ::2]
        weight = weight.transpose(2, 3).contiguous().transpose(2, 3)
    assert same_bits(depthwise_input_grad(grad, weight, size, **sizes), expected)


def test_opcheck():
    grad, weight, size, sizes = inputs("stride 4", torch.float32)
    op = torch.ops.revbifpn.depthwise_input_grad.default
    torch.library.opcheck(op, (grad, weight, *size, *sizes.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.zeros(2, 3, 4)}, r"grad must have shape \(N, C, H, W\)"),
        ({"grad": torch.zeros(2, 16, 8, 8)}, r"grad must have sides \(9, 9\)"),
        ({"weight": torch.zeros(16, 2, 5, 5)}, r"weight must have \(\(16, 1, 5, 5\)"),
        ({"weight": torch.zeros(16, 1, 5, 5).double()}, ".*got .*torch.float64"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
    ],
)
def test_errors(change, message):
    arguments = {
        "grad": torch.zeros(2, 16, 9, 9),
        "weight": torch.zeros(16, 1, 5, 5),
        "size": (9, 9),
        "stride": 1,
        "padding": 2,
    } | change
    with pytest.raises((ValueError, TypeError), match=f"depthwise_input_grad: {message}"):
        depthwise_input_grad(**arguments)


def test_the_dispatcher_op_reads_no_foreign_memory():
    grad = torch.zeros(1, 16, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="grad must have the sides"):
        torch.ops.revbifpn.depthwise_input_grad(grad, torch.zeros(16, 1, 3, 3), 5, 4, 1, 1)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        torch.ops.revbifpn.depthwise_input_grad(grad, torch.zeros(8, 1, 3, 3), 4, 4, 1, 1)
