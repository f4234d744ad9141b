"""1×1 convolutions as matrix products."""

import pytest
import torch
from helpers import assert_as_accurate, same_bits

from revbifpn_kernels.ops.conv.pointwise_conv import (
    pointwise_conv,
    pointwise_conv_backward,
    pointwise_conv_backward_reference,
    pointwise_conv_reference,
)

SHAPES = {"even": (2, 32, 12, 12, 48), "odd": (3, 17, 7, 9, 5), "one": (1, 1, 1, 1, 1)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(shape, dtype, layout=torch.channels_last):
    n, c, h, w, outputs = shape
    x = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype, memory_format=layout)
    grad = torch.randn(n, outputs, h, w, dtype=torch.float64).to(dtype, memory_format=layout)
    return grad, x, torch.randn(outputs, c, 1, 1, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_accurate_as_pytorch(shape, dtype):
    grad, x, weight = inputs(shape, dtype)
    y = pointwise_conv(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, pointwise_conv_reference, x, weight)
    grads = pointwise_conv_backward(grad, x, weight)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(grads, pointwise_conv_backward_reference, grad, x, weight)


@pytest.mark.parametrize("layout", ["contiguous", "slice", "strided"])
def test_layouts_give_the_same_bits(layout):
    grad, x, weight = inputs(SHAPES["even"], torch.float32)
    expected = pointwise_conv(x, weight), *pointwise_conv_backward(grad, x, weight)
    if layout == "contiguous":
        grad, x = grad.contiguous(), x.contiguous()
    elif layout == "slice":
        whole = torch.randn(2, 40, 12, 12).to(memory_format=torch.channels_last)
        whole[:, 8:] = x
        x = whole[:, 8:]
    else:
        grad, x = (t.repeat_interleave(2, dim=3)[..., ::2] for t in (grad, x))
    ours = pointwise_conv(x, weight), *pointwise_conv_backward(grad, x, weight)
    assert all(map(same_bits, ours, expected))


def test_no_image():
    grad, x, weight = (
        t[:0] if k < 2 else t for k, t in enumerate(inputs(SHAPES["even"], DTYPES[1]))
    )
    assert pointwise_conv(x, weight).shape == grad.shape
    grad_x, grad_weight = pointwise_conv_backward(grad, x, weight)
    assert grad_x.shape == x.shape and torch.equal(grad_weight, torch.zeros_like(weight))


def test_opcheck():
    grad, x, weight = inputs(SHAPES["even"], torch.float32)
    ops = torch.ops.revbifpn
    torch.library.opcheck(ops.pointwise_conv.default, (x, weight))
    torch.library.opcheck(ops.pointwise_conv_backward.default, (grad, x, weight))


def test_errors():
    grad, x, weight = inputs(SHAPES["even"], torch.float32)
    with pytest.raises(ValueError, match=r"pointwise_conv: weight must have \(\(48, 32, 1, 1\)"):
        pointwise_conv(x, weight[:, :5])
    with pytest.raises(ValueError, match="pointwise_conv: weight must have .*got .*float64"):
        pointwise_conv(x, weight.double())
    with pytest.raises(ValueError, match="pointwise_conv_backward: grad must have"):
        pointwise_conv_backward(grad[:, 1:], x, weight)
    with pytest.raises(RuntimeError, match="pointwise_conv: weight must have shape"):
        torch.ops.revbifpn.pointwise_conv(x, weight[:, :5])
    with pytest.raises(RuntimeError, match="pointwise_conv_backward: grad must have the shape"):
        torch.ops.revbifpn.pointwise_conv_backward(grad[:, 1:], x, weight)


def test_no_channels_are_refused():
    x, weight = torch.zeros(2, 0, 4, 4), torch.zeros(3, 0, 1, 1)
    with pytest.raises(ValueError, match="pointwise_conv: "):
        pointwise_conv(x, weight)
    with pytest.raises(RuntimeError, match="must have channels on both sides"):
        torch.ops.revbifpn.pointwise_conv(x, weight)
    with pytest.raises(ValueError, match=r"pointwise_conv: weight must have .*meta"):
        pointwise_conv(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 1, 1, device="meta"))
