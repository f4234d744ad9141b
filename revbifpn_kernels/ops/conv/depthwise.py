"""The gradients of a depthwise convolution on CPUs, in channels_last: of its input, its weights.

    dx[n, c, h, w] = Σ_{i,j} W[c, i, j] · grad[n, c, (h + p − i)/s, (w + p − j)/s]
    dW[c, i, j] = Σ_{n,h,w} grad[n, c, h, w] · x[n, c, h·s + i − p, w·s + j − p]

with stride s and padding p; dx sums over the taps where s divides both. x, dx (N, C, H, W), grad
(N, C, h, w), W, dW (C, 1, k, k). dx reads grad from the caches and is written once; dW reads x and
grad once per row of the kernel, from the caches. PyTorch's dx takes 18 to 74 times as long for half
precision and strides (2-core AMD EPYC, one thread, torch 2.12, 2026-11-25:
`benchmarks.bench_mbconv`), its dW 2 to 190 times for kernels of 5 and more. Elsewhere, and on
GPUs, PyTorch's own are called: see `mbconv/convolutions.py`.
"""

import torch
from torch import Tensor

from ..checks import check_maps, check_values
from ..library import library


def depthwise_input_grad_reference(
    grad: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int
) -> Tensor:
    """The specification of dx in plain PyTorch."""
    shape = (*grad.shape[:2], *size)
    return torch.nn.grad.conv2d_input(shape, weight, grad, stride, padding, groups=grad.shape[1])


def depthwise_weight_grad_reference(
    x: Tensor, grad: Tensor, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The specification of dW in plain PyTorch."""
    channels = x.shape[1]
    shape = (channels, 1, kernel_size, kernel_size)
    return torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, groups=channels)


# The CPU's kernels: csrc/conv/depthwise.cpp; dW in float32 or float64.
library.define(
    "depthwise_input_grad(Tensor grad, Tensor weight, int height, int width, int stride, "
    "int padding) -> Tensor"
)
library.define(
    "depthwise_weight_grad(Tensor x, Tensor grad, int kernel_size, int stride, int padding)"
    " -> Tensor"
)


def _check_at_least(op: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def _result_sides(sides, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    return tuple((side + 2 * padding - kernel) // stride + 1 for side in sides)


def _check_input_grad(grad: Tensor, weight: Tensor, height, width, stride, padding) -> None:
    op = "depthwise_input_grad"
    check_maps(op, "grad", grad)
    _check_at_least(op, 1, stride=stride)
    _check_at_least(op, 0, padding=padding)
    kernel = weight.shape[-1]
    expected = (grad.shape[1], 1, kernel, kernel), grad.dtype, grad.device
    check_values(op, "weight", weight, expected)
    sides = _result_sides((height, width), kernel, stride, padding)
    if tuple(grad.shape[2:]) != sides:
        raise ValueError(
            f"{op}: grad must have sides {sides} for an input of {(height, width)}, got "
            f"{tuple(grad.shape[2:])}"
        )


def _check_weight_grad(x: Tensor, grad: Tensor, kernel_size: int, stride, padding) -> None:
    op = "depthwise_weight_grad"
    check_maps(op, "x", x)
    check_maps(op, "grad", grad)
    _check_at_least(op, 1, kernel_size=kernel_size, stride=stride)
    _check_at_least(op, 0, padding=padding)
    shape = (*x.shape[:2], *_result_sides(x.shape[2:], kernel_size, stride, padding))
    if grad.shape != shape or grad.dtype != x.dtype:
        raise ValueError(
            f"{op}: grad must have shape {shape} and dtype {x.dtype}, got "
            f"{tuple(grad.shape)} and {grad.dtype}"
        )


@torch.library.register_fake("revbifpn::depthwise_input_grad", lib=library)
def _depthwise_input_grad_fake(grad, weight, height, width, stride, padding):
    _check_input_grad(grad, weight, height, width, stride, padding)
    result = grad.new_empty((*grad.shape[:2], height, width))
    return result.to(memory_format=torch.channels_last)


@torch.library.register_fake("revbifpn::depthwise_weight_grad", lib=library)
def _depthwise_weight_grad_fake(x, grad, kernel_size, stride, padding):
    _check_weight_grad(x, grad, kernel_size, stride, padding)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size), dtype=dtype)


def depthwise_input_grad(
    grad: Tensor,  # (N, C, h, w)
    weight: Tensor,  # (C, 1, k, k)
    size: tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the gradient (N, C, *size) w.r.t. x of `F.conv2d(x, weight, …, groups=C)`.

    Equivalent to `torch.nn.grad.conv2d_input`, accumulated in float32 (float64 for float64), in
    channels_last, the same bits on any number of threads. grad and weight, of one dtype, may be
    float64, float32, bfloat16 or float16, and are copied unless grad is channels_last or a slice
    of it. CPU only; not differentiable.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    _check_input_grad(grad, weight, *size, stride, padding)
    grad, weight = _channels_beside(grad), weight.contiguous()
    return torch.ops.revbifpn.depthwise_input_grad(grad, weight, *size, stride, padding)


def depthwise_weight_grad(
    x: Tensor,  # (N, C, H, W)
    grad: Tensor,  # (N, C, h, w)
    *,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the gradient (C, 1, k, k) w.r.t. weight of `F.conv2d(x, weight, …, groups=C)`.

    Equivalent to `torch.nn.grad.conv2d_weight`, accumulated in float32 (float64 for float64), the
    same bits on any number of threads. x and grad as grad in `depthwise_input_grad`. CPU only; not
    differentiable.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    _check_weight_grad(x, grad, kernel_size, stride, padding)
    x, grad = _channels_beside(x), _channels_beside(grad)
    sums = torch.ops.revbifpn.depthwise_weight_grad(x, grad, kernel_size, stride, padding)
    return sums if sums.dtype == x.dtype else sums.to(x.dtype)


def _channels_beside(maps: Tensor) -> Tensor:
    """`maps`, copied unless the channels of a pixel lie side by side."""
    return maps if maps.stride(1) == 1 else maps.contiguous(memory_format=torch.channels_last)
