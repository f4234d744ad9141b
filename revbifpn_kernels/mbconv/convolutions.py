"""The convolutions of an MBConv and their gradients: by our kernels on CPUs where they are faster.

The rules are measured: `python -m benchmarks.bench_mbconv --parts convolutions blocks` times ours
beside PyTorch's, one by one and in every MBConv of RevBiFPN-S0 to S6. On GPUs PyTorch's are called.
"""

import platform
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv.depthwise import depthwise_input_grad, depthwise_weight_grad
from ..ops.layout import is_channels_last

_ops = torch.ops.revbifpn

# Whether PyTorch's convolutions of half precision take 3 to 90 times as long as those of float32
# with both conversions, which round once as well (AMD EPYC, AVX2, torch 2.12, 2026-11-26).
IS_HALF_SLOW = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.cpu.get_cpu_capability() != "AVX512"
)
# Our depthwise weight gradient is used for kernels of 5 and more, where PyTorch's takes 3 to 34
# times as long in float32; at 3x3 it takes 1.0 to 1.7 times, but comes with the gradient of x.
SMALLEST_OWN_KERNEL = 5


class ConvInGraph(SimpleNamespace):
    """A convolution in a graph of `torch.compile`; its attributes are those of nn.Conv2d."""


def _is_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 1×1 convolution is a matrix product of pixels, in channels_last on a CPU.

    Its backward then takes 0.6 to 1.1 times PyTorch's time, its forward 0.9 to 1.2 times (AMD EPYC,
    AVX2, float32); on an Intel Xeon both are faster: see `ops/conv/pointwise_conv.py`.
    """
    return (
        conv.groups == 1
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and x.is_cpu
        and is_channels_last(x)
    )


def are_slow(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's convolutions of this dtype are better computed in float32."""
    return IS_HALF_SLOW and device == "cpu" and dtype.itemsize == 2


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """`conv(x)` with this weight of x's dtype, without bias."""
    if are_slow(x.device.type, x.dtype):
        return convolve(conv, x.float(), weight.float()).to(x.dtype)
    if _is_product(conv, x):
        in_graph = isinstance(conv, ConvInGraph)
        return _product(x, weight) if in_graph else _ops.pointwise_conv(x, weight)
    return F.conv2d(x, weight, None, conv.stride, conv.padding, groups=conv.groups)


def convolve_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight; that of weight may be float32."""
    needs_x, needs_weight = needs
    kernel = conv.kernel_size[0]
    is_depthwise = x.is_cpu and x.stride(1) == 1 and conv.groups == x.shape[1] == weight.shape[0]
    sizes = {"stride": conv.stride[0], "padding": conv.padding[0]}
    grad_x = grad_weight = None
    if is_depthwise and needs_weight and kernel >= SMALLEST_OWN_KERNEL:
        grad_weight = depthwise_weight_grad(x, grad, kernel_size=kernel, **sizes)
        needs_weight = False
    if is_depthwise and needs_x and sizes["stride"] > 1 and x.itemsize == 2:
        grad_x = depthwise_input_grad(grad, weight, x.shape[2:], **sizes)
        needs_x = False
    if needs_x or needs_weight:
        is_slow = are_slow(x.device.type, x.dtype)
        given = [t.float() if is_slow else t for t in (grad, x, weight)]
        theirs = _whole_backward(conv, *given, (needs_x, needs_weight))
        grad_x = theirs[0].to(x.dtype) if needs_x else grad_x
        grad_weight = theirs[1] if needs_weight else grad_weight
    return grad_x, grad_weight


def _whole_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight by one call."""
    if not _is_product(conv, x):
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
            conv.groups, [*needs, False],
        )[:2]  # fmt: skip
    if isinstance(conv, ConvInGraph):
        grad_x = _product(grad, weight.transpose(0, 1)) if needs[0] else None
        grad_weight = _rows(grad).t() @ _rows(x) if needs[1] else None
        return grad_x, grad_weight
    if needs[1]:
        return _ops.pointwise_conv_backward(grad, x, weight)
    return _ops.pointwise_conv(grad, weight.transpose(0, 1)), None


def _rows(maps: Tensor) -> Tensor:
    """The pixels of channels_last maps, (N·H·W, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """A 1×1 convolution as a product that the compiler sees, rather than by our operator."""
    n, _, h, w = x.shape
    return (_rows(x) @ weight.flatten(1).t()).view(n, h, w, -1).permute(0, 3, 1, 2)
