"""The input's gradient of a depthwise convolution on CPUs, in channels_last.

dx[n, c, h, w] = Σ_{i,j} grad[n, c, (h + padding − i)/stride, (w + padding − j)/stride] · W[c, i, j]

over the taps where both divide. grad (N, C, h, w), W (C, 1, k, k), dx (N, C, H, W). Reads grad from
the caches and writes dx once. For half precision and strides PyTorch's takes 18 to 74 times as
long (2-core AMD EPYC, one thread, torch 2.12, 2026-11-25: `benchmarks.bench_depthwise`); for
float32, or without strides, it is mostly the faster one and is called, as it is on GPUs: see
`fused_mbconv.py`.
"""

import torch
from torch import Tensor

from ..checks import check_maps, check_values
from ..library import library


def depthwise_input_grad_reference(
    grad: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int
) -> Tensor:
    """The specification in plain PyTorch."""
    shape = (*grad.shape[:2], *size)
    return torch.nn.grad.conv2d_input(shape, weight, grad, stride, padding, groups=grad.shape[1])


# CPU: csrc/conv/depthwise_input_grad.cpp.
library.define(
    "depthwise_input_grad(Tensor grad, Tensor weight, int height, int width, int stride, "
    "int padding) -> Tensor"
)


def _check(grad: Tensor, weight: Tensor, height, width, stride: int, padding: int) -> None:
    op = "depthwise_input_grad"
    check_maps(op, "grad", grad)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if value < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    kernel = weight.shape[-1]
    expected = (grad.shape[1], 1, kernel, kernel), grad.dtype, grad.device
    check_values(op, "weight", weight, expected)
    sides = tuple((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    if tuple(grad.shape[2:]) != sides:
        raise ValueError(
            f"{op}: grad must have sides {sides} for an input of {(height, width)}, got "
            f"{tuple(grad.shape[2:])}"
        )


@torch.library.register_fake("revbifpn::depthwise_input_grad", lib=library)
def _depthwise_input_grad_fake(grad, weight, height, width, stride, padding):
    _check(grad, weight, height, width, stride, padding)
    result = grad.new_empty((*grad.shape[:2], height, width))
    return result.to(memory_format=torch.channels_last)


def depthwise_input_grad(
    grad: Tensor,  # (N, C, h, w)
    weight: Tensor,  # (C, 1, k, k)
    size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the gradient (N, C, *size) of the x of `F.conv2d(x, weight, …, groups=C)`.

    Equivalent to `torch.nn.grad.conv2d_input`, accumulated in float32 (float64 for float64), in
    channels_last, the same bits on any number of threads. CPU only; not differentiable.

    Args:
        grad: Of the convolution's result: float64, float32, bfloat16 or float16; fastest in
            channels_last, and slices of it.
        weight: In grad's dtype.
        size: Of the convolution's input, (H, W).

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    _check(grad, weight, *size, stride, padding)
    if grad.stride(1) != 1:
        grad = grad.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    return torch.ops.revbifpn.depthwise_input_grad(grad, weight, *size, stride, padding)
