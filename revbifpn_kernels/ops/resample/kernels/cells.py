"""Triton building blocks of the fast path: maps cut into cells of CELL_H × CELL_W outputs.

A lane owns `chain` cells of one plane, one below the other, and walks down their rows: it loads and
interpolates each source row once. `CHANNELS_LAST` decides what the next lane holds: the next cell
of the row, whose values then move CELL_W at a time (at most 16 bytes), or the next channel. Values
of a row are tuples of [BLOCK] tensors, one per column. A cell may be half as wide as a source pixel
is enlarged; two neighbouring cells, the left and the right one, then share that pixel. All weights
of the factors 2, 4 and 8 are multiples of 1/16, so exact.

The arithmetic is spelled out as `fma` and compiled without contraction: every kernel computes the
same bits for the same element, which the lattice relies on.
"""

import triton
import triton.language as tl

from ...tiling import shown
from .lanes import GROUP, is_left_half, lanes_beside, side_borders, take_lanes


@triton.constexpr_function
def first_tap(i, factor):
    """The index of the first source pixel that output i reads; 0 is the halo before the cell."""
    return (2 * i + 1 + factor) // (2 * factor)


@triton.constexpr_function
def second_weight(i, factor):
    """The weight of the source pixel after `first_tap`; the first one has the rest to 1."""
    return ((2 * i + 1 + factor) % (2 * factor)) / (2 * factor)


@triton.constexpr_function
def is_bilinear(factor, mode):
    return mode == "bilinear" and factor > 1


@triton.constexpr_function
def pixels_along(factor, cell_side):
    """How many source pixels a cell's side has; 1 where the cell is half a pixel's outputs."""
    return max(1, cell_side // factor)


@triton.constexpr_function
def is_half(factor, cell_w):
    """Whether two neighbouring cells share a source pixel."""
    return factor == 2 * cell_w


@triton.jit
def cell_pointer(
    ptr, strides, UNIT: tl.constexpr, cell, FACTOR: tl.constexpr, CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
):  # fmt: skip
    """Each lane's first element in a map that is FACTOR times smaller than the one cut into cells.

    Strides of n, c and h are `hidden`, in UNITs of elements: the compiler knows what divides them.
    """
    n, c, row, col, _, _ = cell
    plane = (n * shown(strides[0]) + c * shown(strides[1])) * UNIT
    rows = row.to(tl.int64) * (CELL_H // FACTOR) * shown(strides[2]) * UNIT
    if is_half(FACTOR, CELL_W):
        col = col // 2
    return ptr + plane + rows + col.to(tl.int64) * pixels_along(FACTOR, CELL_W) * strides[3]


@triton.jit
def split_columns(tile, COUNT: tl.constexpr):
    """[BLOCK, COUNT] as COUNT tensors of [BLOCK]."""
    if COUNT == 2:
        first, second = tl.split(tile)
        return (first, second)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], COUNT // 2, 2]))
        evens = split_columns(even, COUNT // 2)
        odds = split_columns(odd, COUNT // 2)
        columns = ()
        for j in tl.static_range(COUNT // 2):
            columns = columns + (evens[j], odds[j])
        return columns


@triton.jit
def join_columns(columns):
    """A tuple of 1, 2, 4 or 8 tensors of [BLOCK] as [BLOCK, count]."""
    if len(columns) == 1:
        return columns[0][:, None]
    elif len(columns) == 2:
        return tl.join(columns[0], columns[1])
    elif len(columns) == 4:
        tile = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
        return tl.reshape(tile, [tile.shape[0], 4])
    else:
        even = tl.join(tl.join(columns[0], columns[4]), tl.join(columns[2], columns[6]))
        odd = tl.join(tl.join(columns[1], columns[5]), tl.join(columns[3], columns[7]))
        tile = tl.join(even, odd)
        return tl.reshape(tile, [tile.shape[0], 8])


@triton.jit
def load_columns(ptr, stride_w, COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """COUNT neighbours in a row from each lane's pointer on, in float32."""
    columns = ()
    if COUNT == 1 or CHANNELS_LAST:
        for j in tl.static_range(COUNT):
            columns = columns + (tl.load(ptr + j * stride_w).to(tl.float32),)
    elif COUNT > 1:
        tile = tl.load(ptr[:, None] + tl.arange(0, COUNT)[None, :]).to(tl.float32)
        columns = split_columns(tile, COUNT)
    return columns


@triton.jit
def store_columns(ptr, columns, stride_w, mask, CHANNELS_LAST: tl.constexpr):
    """Store a tuple of [BLOCK] as neighbours of a row, rounded to the dtype behind `ptr`."""
    if CHANNELS_LAST or len(columns) == 1:
        for j in tl.static_range(len(columns)):
            value = columns[j].to(ptr.dtype.element_ty)
            tl.store(ptr + j * stride_w, value, mask=mask)
    else:
        tile = join_columns(columns).to(ptr.dtype.element_ty)
        tl.store(ptr[:, None] + tl.arange(0, len(columns))[None, :], tile, mask=mask[:, None])


@triton.jit
def border_weights(at_border, FACTOR: tl.constexpr):
    """Weights of the two taps of a cell's first FACTOR // 2 outputs, whose first tap is the halo.

    At the border no pixel precedes the cell, and PyTorch clamps the coordinate: pixel 0 has weight
    1, and pixel 1, which the halo load reads there instead, has weight 0.
    """
    weights = ()
    for j in tl.static_range(FACTOR // 2):
        first = tl.where(at_border, 0.0, 1.0 - second_weight(j, FACTOR))
        second = tl.where(at_border, 1.0, second_weight(j, FACTOR))
        weights = weights + ((first, second),)
    return weights


@triton.jit
def halo_offsets(at_start, at_end, COUNT: tl.constexpr):
    """Offsets of the pixels before and after a cell's COUNT source pixels, kept inside the map."""
    second = tl.where(at_end, 0, 1) if COUNT == 1 else 1  # one pixel: it is both neighbours
    return tl.where(at_start, second, -1), tl.where(at_end, COUNT - 1, COUNT)


@triton.jit
def half_weights(cell, FACTOR: tl.constexpr):
    """Weights of the two taps of each output of a cell that is half a source pixel's outputs."""
    is_left = is_left_half(cell)
    border = border_weights(side_borders(cell)[0], FACTOR)
    weights = ()
    for j in tl.static_range(FACTOR // 2):
        second = second_weight(j + FACTOR // 2, FACTOR)
        pair = (
            tl.where(is_left, border[j][0], 1.0 - second),
            tl.where(is_left, border[j][1], second),
        )
        weights = weights + (pair,)
    return weights


@triton.jit
def load_scaling(
    scale_ptrs, scale_strides, shift_ptrs, shift_strides, n, c,
    COUNT: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """(scale, shift) of COUNT sources at each lane's plane; empty tuples without scales."""
    scaling = ()
    for k in tl.static_range(COUNT):
        if HAS_SCALES:
            scale = tl.load(scale_ptrs[k] + n * shown(scale_strides[k]) + c)
            shift = tl.load(shift_ptrs[k] + n * shown(shift_strides[k]) + c)
            scaling = scaling + ((scale, shift),)
        else:
            scaling = scaling + ((),)
    return scaling


@triton.jit
def scale_value(value, scaling):
    """scale·value + shift, or `value` where `scaling` is empty."""
    if len(scaling) == 0:
        return value
    else:
        return tl.fma(value, scaling[0], scaling[1])


@triton.jit
def scale_columns(columns, scaling):
    scaled = ()
    for j in tl.static_range(len(columns)):
        scaled = scaled + (scale_value(columns[j], scaling),)
    return scaled


@triton.jit
def add_halo(pixels, cell):
    """The source pixels of each lane's cell with those before and after it, from the lanes beside.

    As `halo_offsets`: before the first pixel of a row comes the second, after the last itself.
    """
    COUNT: tl.constexpr = len(pixels)
    at_left, at_right = side_borders(cell)
    place, before, after = lanes_beside(cell)
    after = tl.where(at_right, place, after)
    if COUNT == 1:
        left = take_lanes(pixels[0], tl.where(at_left, after, before))
        right = take_lanes(pixels[0], after)
    else:
        left = tl.where(at_left, pixels[1], take_lanes(pixels[COUNT - 1], before))
        right = tl.where(at_right, pixels[COUNT - 1], take_lanes(pixels[0], after))
    return (left,) + pixels + (right,)


@triton.jit
def add_other_tap(pixel, cell):
    """The two source pixels that each lane's cell reads if it is half a source pixel's outputs.

    At the row's ends as in `add_halo`; there the second pixel is two lanes on.
    """
    _, _, _, col, _, cells_w = cell
    is_left = is_left_half(cell)
    at_left, at_right = side_borders(cell)
    place, before, after = lanes_beside(cell)
    second = tl.where(cells_w == 2, place, tl.minimum(place + 2, GROUP - 1))
    before = tl.where(at_left, second, before)
    after = tl.where(at_right, place, after)
    other = take_lanes(pixel, tl.where(is_left, before, after))
    return tl.where(is_left, other, pixel), tl.where(is_left, pixel, other)


@triton.jit
def load_with_halo(
    ptr, stride_w, cell, scaling, FACTOR: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The scaled source pixels that a row of each lane's cell reads, from the row at `ptr`."""
    COUNT: tl.constexpr = pixels_along(FACTOR, CELL_W)
    pixels = load_columns(ptr, stride_w, COUNT, CHANNELS_LAST)
    if CHANNELS_LAST:
        before, after = halo_offsets(*side_borders(cell), COUNT)
        left = tl.load(ptr + before * stride_w).to(tl.float32)
        right = tl.load(ptr + after * stride_w).to(tl.float32)
        return scale_columns((left,) + pixels + (right,), scaling)
    elif is_half(FACTOR, CELL_W):
        return add_other_tap(scale_value(pixels[0], scaling), cell)
    else:
        return add_halo(scale_columns(pixels, scaling), cell)


@triton.jit
def expand_row(
    ptr, stride_w, cell, scaling,
    FACTOR: tl.constexpr, CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The row of source pixels at `ptr`, scaled, interpolated along the width: CELL_W values."""
    pixels = load_with_halo(ptr, stride_w, cell, scaling, FACTOR, CELL_W, CHANNELS_LAST)
    at_left, _ = side_borders(cell)
    weights = half_weights(cell, FACTOR) if is_half(FACTOR, CELL_W) else ()
    # The weights at the border; a select per value takes fewer registers than weights per lane.
    clamped = tl.fma(pixels[1], 1.0, pixels[0] * 0.0)
    expanded = ()
    for j in tl.static_range(CELL_W):
        if is_half(FACTOR, CELL_W):
            value = tl.fma(pixels[1], weights[j][1], pixels[0] * weights[j][0])
        else:
            left = pixels[first_tap(j, FACTOR)]
            right = pixels[first_tap(j, FACTOR) + 1]
            value = tl.fma(right, second_weight(j, FACTOR), left * (1.0 - second_weight(j, FACTOR)))
            if first_tap(j, FACTOR) == 0:
                value = tl.where(at_left, clamped, value)
        expanded = expanded + (value,)
    return expanded
