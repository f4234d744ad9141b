"""GPU kernels launched from CPU tensors on the stub driver, and steps without convolutions.

What is left is the host's part: Python, PyTorch's dispatcher, autograd's engine, Triton's launcher.
"""

import contextlib
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revbifpn_kernels import ops
from revbifpn_kernels.mbconv import fused, transform
from revbifpn_kernels.models.layers import STEM_STRIDE, Stem
from revbifpn_kernels.ops import direct

from .stub_driver import stub_gpu


def gpu_implementations() -> dict[str, Callable]:
    """The Python function that computes each operator on GPUs; found by its name, `NAME_cuda`."""
    found = {}
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            match = re.fullmatch(r"_?(\w+?)_cuda(_?)", name)
            if match and hasattr(torch.ops.revbifpn, "".join(match.groups())):
                found["".join(match.groups())] = value
    return found


@contextlib.contextmanager
def ops_launch_on_stub() -> Iterator[Callable[[], int]]:
    """Inside, our ops launch their GPU kernels on CPU tensors; yields the count of launches."""
    library = torch.library.Library("revbifpn", "IMPL")
    try:
        for name, function in gpu_implementations().items():
            library.impl(name, function, "CPU", allow_override=True)
        with (
            mock.patch.object(direct, "is_on_cpu", lambda _: False),
            mock.patch.dict(direct.known, clear=True),
            stub_gpu() as launches,
        ):
            yield launches
    finally:
        library._destroy()


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Callable[[], Any]]]:
    """Yields a list of functions: each repeats one launch by Triton's C launcher alone."""
    from triton.backends.nvidia.driver import CudaLauncher

    repeats, launch = [], CudaLauncher.__call__

    @functools.wraps(launch)
    def recorded(self, *arguments):
        leading, values = arguments[:6], arguments[9:]
        repeats.append(lambda: launch(self, *leading, None, None, None, *values))
        return launch(self, *arguments)

    with mock.patch.object(CudaLauncher, "__call__", recorded):
        yield repeats


class _Convolution(torch.autograd.Function):
    """Allocates the results of a convolution and of its backward, and computes nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _convolved(x, weight, stride, padding)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        grads = [
            None if tensor is None else torch.empty_like(tensor) for tensor in (x, weight, bias)
        ]
        return *grads, None, None


def _convolved(x: Tensor, weight: Tensor, stride, padding) -> Tensor:
    sides = [
        (side + 2 * pad - kernel) // step + 1
        for side, pad, kernel, step in zip(
            x.shape[2:], padding, weight.shape[2:], stride, strict=True
        )
    ]
    return x.new_empty(len(x), len(weight), *sides)


def _conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return _Convolution.apply(x, weight, bias, stride, padding)


def _convolve_backward(conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs):
    return tuple(
        torch.empty_like(t) if n else None for t, n in zip((x, weight), needs, strict=True)
    )


def _stem(self: Stem, image: Tensor) -> Tensor:
    sides = (side // STEM_STRIDE for side in image.shape[2:])
    return image.new_zeros(len(image), self.channels, *sides)


@contextlib.contextmanager
def convolutions_stubbed(*, is_fused: bool) -> Iterator[None]:
    """Convolutions allocate their results and do nothing else; MBConvs are fused or as modules."""
    patches = {
        fused: {
            "convolve": lambda conv, x, w: _convolved(x, w, conv.stride, conv.padding),
            "convolve_backward": _convolve_backward,
        },
        F: {"conv2d": _conv2d},
        Stem: {"forward": _stem},
        transform: {} if is_fused else {"can_run": lambda x: False},
    }
    with contextlib.ExitStack() as stack:
        for target, replacements in patches.items():
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch.object(target, name, replacement))
        yield
