"""The weights' gradient of a depthwise convolution on CPUs, in channels_last.

dW[c, i, j] = Σ_{n,h,w} grad[n, c, h, w] · x[n, c, h·stride + i − padding, w·stride + j − padding]

x (N, C, H, W), grad (N, C, h, w), dW (C, 1, k, k). Reads x and grad once a row of the kernel, from
the caches, where PyTorch's takes 2 to 190 times as long for kernels of 5 and more. On GPUs
PyTorch's own is called: see `fused_mbconv.py`.
"""

import torch
from torch import Tensor

from ..checks import check_maps
from ..library import library


def depthwise_weight_grad_reference(
    x: Tensor, grad: Tensor, kernel_size: int, stride: int, padding: int
) -> Tensor:
    """The specification in plain PyTorch."""
    channels = x.shape[1]
    shape = (channels, 1, kernel_size, kernel_size)
    return torch.nn.grad.conv2d_weight(x, shape, grad, stride, padding, groups=channels)


# (C, 1, k, k) in float32 or float64. CPU: csrc/conv/depthwise_weight_grad.cpp.
library.define(
    "depthwise_weight_grad(Tensor x, Tensor grad, int kernel_size, int stride, int padding)"
    " -> Tensor"
)


def _check(x: Tensor, grad: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    op = "depthwise_weight_grad"
    check_maps(op, "x", x)
    check_maps(op, "grad", grad)
    for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1)):
        if value < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if padding < 0:
        raise ValueError(f"{op}: padding must be at least 0, got {padding}")
    sides = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in x.shape[2:])
    if grad.shape != (*x.shape[:2], *sides) or grad.dtype != x.dtype:
        raise ValueError(
            f"{op}: grad must have shape {(*x.shape[:2], *sides)} and dtype {x.dtype}, got "
            f"{tuple(grad.shape)} and {grad.dtype}"
        )


@torch.library.register_fake("revbifpn::depthwise_weight_grad", lib=library)
def _depthwise_weight_grad_fake(x, grad, kernel_size, stride, padding):
    _check(x, grad, kernel_size, stride, padding)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size), dtype=dtype)


def depthwise_weight_grad(
    x: Tensor,  # (N, C, H, W)
    grad: Tensor,  # (N, C, h, w)
    *,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return the gradient (C, 1, k, k) of `F.conv2d(x, weight, None, stride, padding, groups=C)`.

    Equivalent to `torch.nn.grad.conv2d_weight`, accumulated in float32 (float64 for float64), the
    same bits on any number of threads. CPU only; not differentiable.

    Args:
        x: float64, float32, bfloat16 or float16; fastest in channels_last, and slices of it.
        grad: Of the convolution's result, in x's dtype.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """
    _check(x, grad, kernel_size, stride, padding)
    x, grad = _channels_beside(x), _channels_beside(grad)
    sums = torch.ops.revbifpn.depthwise_weight_grad(x, grad, kernel_size, stride, padding)
    return sums if sums.dtype == x.dtype else sums.to(x.dtype)


def _channels_beside(maps: Tensor) -> Tensor:
    """`maps`, copied unless the channels of a pixel lie side by side."""
    return maps if maps.stride(1) == 1 else maps.contiguous(memory_format=torch.channels_last)
