"""Triton building blocks of batch statistics, norm_act and its gradient.

A program owns CHANNELS channels of some images and a chunk of their pixels, and walks through them
in tiles [CHANNELS, PIXELS], so it loads the factors of its channels once. UNIT divides the extent
along memory and all other strides, and these are passed in UNITs, so that Triton sees that loads
are aligned: it cannot see in an argument that, for example, rows of 196 elements start at multiples
of 16 bytes. `CHANNELS_LAST` only says which side of the tile lies along memory.

Sums are added in a fixed order, never by atomics: the same bits on every run. The compiler
contracts nothing (launch.py), so every fused multiply-add is written as `fma`.
"""

import triton
import triton.language as tl

from ..tiling import shown

# Arguments that vary with the batch: not specialised on, so a new batch size does not recompile.
COUNTS = ("N", "C", "pixels", "blocks", "chunks", "images", "chunk", "parts")


@triton.jit
def hardswish_share(z):
    return tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACT == "hardswish":
        return z * hardswish_share(z)
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def activate_with_slope(z, ACT: tl.constexpr):
    """act(z) and act′(z), at the kinks PyTorch's value."""
    if ACT == "silu":
        share = tl.sigmoid(z)
        return z * share, share * tl.fma(z, 1.0 - share, 1.0)
    elif ACT == "hardswish":
        share = hardswish_share(z)
        # z/3 + ½ is share + z/6; outside, share alone is the slope.
        return z * share, tl.fma(tl.where(tl.abs(z) >= 3.0, 0.0, z), 1.0 / 6.0, share)
    elif ACT == "relu":
        return activate(z, ACT), tl.where(z <= 0.0, 0.0, 1.0)
    else:
        return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def locate(
    N, C, pixels, blocks, chunks, images, chunk,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """C, this program's channels [CHANNELS, 1], first and end image, first and end tile.

    Blocks of channels vary fastest: programs that run together read neighbours in both formats.
    """
    if CHANNELS_LAST:
        C = C * UNIT
        tiles = tl.cdiv(pixels, PIXELS)
    else:
        tiles = tl.cdiv(pixels, PIXELS // UNIT)
    pid = tl.program_id(0)
    part = pid // blocks
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    n = (part // chunks).to(tl.int64) * images
    t = (part % chunks).to(tl.int64) * chunk
    return C, c, n, tl.minimum(n + images, N), t, tl.minimum(t + chunk, tiles)


@triton.jit
def pixels_in_tile(
    t, pixels, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """How many pixels of tile t lie in the map."""
    FACTOR: tl.constexpr = 1 if CHANNELS_LAST else UNIT
    left = tl.minimum(pixels - t * (PIXELS // FACTOR), PIXELS // FACTOR)
    return left.to(tl.int32) * FACTOR


@triton.jit
def tile_mask(
    c, C, t, pixels, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """[CHANNELS, PIXELS]: what of tile t lies in the map."""
    left = pixels_in_tile(t, pixels, UNIT, PIXELS, CHANNELS_LAST)
    return (c < C) & (tl.arange(0, PIXELS)[None, :] < left)


@triton.jit
def tile_pointers(
    ptr, strides, n, c, t, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """[CHANNELS, PIXELS] pointers to tile t of image n; strides of n, c and pixels."""
    # The interpreter's loop counters are Python ints, and would take a stride's 32 bits.
    n = tl.full([], n, tl.int64)
    p = tl.full([], t, tl.int64) * PIXELS
    offs_p = tl.arange(0, PIXELS)[None, :]
    if CHANNELS_LAST:
        base = ptr + (n * shown(strides[0]) + p * shown(strides[2])) * UNIT
        return base + (offs_p.to(tl.int64) * shown(strides[2])) * UNIT + c
    else:
        base = ptr + (n * shown(strides[0])) * UNIT + p
        return base + (c.to(tl.int64) * shown(strides[1])) * UNIT + offs_p


@triton.jit
def load_tile(
    ptr, strides, n, c, t, mask,
    UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Tile t of image n in float32; zeros where `mask` is false."""
    ptr = tile_pointers(ptr, strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C):
    """Mean, invstd·weight and bias of each channel, [CHANNELS, 1]."""
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    scale = tl.load(invstd_ptr + c, mask=mask, other=0.0)
    bias = tl.zeros_like(mean)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=mask, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0)
    return mean, scale, bias
