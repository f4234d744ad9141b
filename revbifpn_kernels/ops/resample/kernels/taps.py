"""Triton building blocks for any pair of sizes: a lane per element, which computes its own taps.

Coordinates are exact: floor and remainder of whole numbers (float32's for sides up to 2²²), rounded
once when the weight is formed.
"""

import triton
import triton.language as tl

from .lanes import locate


@triton.jit
def locate_elements(
    elements, C, H, W, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr
):
    """Which lanes are in range, and each lane's (n, c, i, j), clamped into range."""
    lane = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    n, c, i, j = locate(tl.minimum(lane, elements - 1), C, H, W, CHANNELS_LAST)
    return lane < elements, (n.to(tl.int64), c.to(tl.int64), i.to(INDEX), j.to(INDEX))


@triton.jit
def element_pointer(ptr, strides, n, c, i, j):
    i, j = i.to(tl.int64), j.to(tl.int64)
    return ptr + n * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]


@triton.jit
def bilinear_taps(i, size, target):
    """The two source pixels of output i along one side, and the second one's weight."""
    # Coordinate (i + ½)·size/target − ½ as a fraction over 2·target.
    numerator = tl.maximum((2 * i + 1) * size - target, 0)
    first = numerator // (2 * target)
    remainder = (numerator % (2 * target)).to(tl.float32)
    weight = tl.div_rn(remainder, tl.zeros_like(remainder) + 2 * target)
    # A side of the target's size is not resampled: its second tap must not spread a NaN.
    second = tl.where(size == target, first, tl.minimum(first + 1, size - 1))
    return first, second, weight


@triton.jit
def nearest_tap(i, size, target, ratio):
    """PyTorch's rule, with its rounding: `ratio` is size/target in float32."""
    scaled = (i.to(tl.float32) * ratio).to(i.dtype)
    tap = tl.where(2 * size == target, i // 2, tl.minimum(scaled, size - 1))
    return tl.where(size == target, i, tap)


@triton.jit
def first_output(r, size, target):
    """An output at most one before the first that reaches source pixel r, in either mode."""
    # Bilinear reaches from the coordinate r − 1 on: (2r − 1)·target/(2·size) − ½.
    return tl.maximum((2 * r - 1) * target - size, 0) // (2 * size)


@triton.jit
def bilinear_gradient_weight(i, r, size, target):
    """Weight of output i in the gradient of source pixel r."""
    first, second, weight = bilinear_taps(i, size, target)
    return tl.where(first == r, 1.0 - weight, 0.0) + tl.where(second == r, weight, 0.0)


@triton.jit
def nearest_gradient_weight(i, r, size, target, ratio):
    return tl.where(nearest_tap(i, size, target, ratio) == r, 1.0, 0.0)
