"""Triton building blocks of the fast path: maps cut into cells of CELL_H × CELL_W outputs.

A lane owns `chain` cells of one plane, one below the other. The source values around a cell are
loaded once and shared by all its outputs. `CHANNELS_LAST` decides what the next lane holds: the
next cell of the row, whose values then move CELL_W at a time (16 bytes), or the next channel.
Values of a cell are tuples of [BLOCK] tensors, one per column. All weights of the factors 2, 4 and
8 are multiples of 1/16, so exact.

The arithmetic is spelled out as `fma` and compiled without contraction: every kernel computes the
same bits for the same element, which the lattice relies on.
"""

import triton
import triton.language as tl


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


@triton.jit
def locate_cells(
    lanes, C, cells_h, cells_w, chain, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Which lanes of this program are in range, and the first cell of each lane's chain.

    A cell is the tuple (n, c, row, column, cells_h, cells_w).
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Clamped, every load is in bounds: only stores need the mask.
    rest = tl.minimum(lane, lanes - 1)
    if CHANNELS_LAST:
        c = rest % C
        rest = rest // C
    col = rest % cells_w
    rest = rest // cells_w
    row = rest % (cells_h // chain) * chain
    n = rest // (cells_h // chain)
    if not CHANNELS_LAST:
        c = n % C
        n = n // C
    return lane < lanes, (n.to(tl.int64), c.to(tl.int64), row, col, cells_h, cells_w)


@triton.jit
def cell_below(cell, steps):
    n, c, row, col, cells_h, cells_w = cell
    return n, c, row + steps, col, cells_h, cells_w


@triton.jit
def cell_borders(cell):
    """Whether each lane's cell lies at the top, bottom, left and right border of its map."""
    _, _, row, col, cells_h, cells_w = cell
    return row == 0, row == cells_h - 1, col == 0, col == cells_w - 1


@triton.jit
def cell_pointer(
    ptr, strides, UNIT: tl.constexpr, cell, CELL_H: tl.constexpr, CELL_W: tl.constexpr
):
    """Each lane's first element in a map whose cells are CELL_H × CELL_W.

    Strides of n, c and h are in UNITs of elements, so the compiler knows what divides them.
    """
    n, c, row, col, _, _ = cell
    plane = (n * strides[0] + c * strides[1]) * UNIT
    rows = row.to(tl.int64) * CELL_H * strides[2] * UNIT
    return ptr + plane + rows + col.to(tl.int64) * CELL_W * strides[3]


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
def load_values(ptr, mask):
    """In float32; zeros where `mask`, which may be None, is false."""
    if mask is None:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, stride_w, COUNT: tl.constexpr, CHANNELS_LAST: tl.constexpr, mask=None):
    """COUNT neighbours in a row from each lane's pointer on, as `load_values`."""
    columns = ()
    if COUNT == 1 or CHANNELS_LAST:
        for j in tl.static_range(COUNT):
            columns = columns + (load_values(ptr + j * stride_w, mask),)
    elif COUNT * ptr.dtype.element_ty.primitive_bitwidth > 128:
        # At most 16 bytes per load: a wider tile spreads over two lanes and cannot be split.
        columns = load_columns(ptr, 1, COUNT // 2, False, mask)
        columns = columns + load_columns(ptr + COUNT // 2, 1, COUNT // 2, False, mask)
    elif COUNT > 1:
        tile_mask = None if mask is None else mask[:, None]
        tile = load_values(ptr[:, None] + tl.arange(0, COUNT)[None, :], tile_mask)
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
def load_scaling(scale_ptrs, shift_ptrs, plane, COUNT: tl.constexpr, HAS_SCALES: tl.constexpr):
    """(scale, shift) of COUNT sources at each lane's plane n·C + c; empty tuples without scales."""
    scaling = ()
    for k in tl.static_range(COUNT):
        if HAS_SCALES:
            scaling = scaling + ((tl.load(scale_ptrs[k] + plane), tl.load(shift_ptrs[k] + plane)),)
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
def expand_row(
    ptr, stride_w, sides, scaling,
    FACTOR: tl.constexpr, CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The row of source pixels at `ptr`, scaled, interpolated along the width: CELL_W values."""
    before, after, border = sides
    COUNT: tl.constexpr = CELL_W // FACTOR
    pixels = (tl.load(ptr + before * stride_w).to(tl.float32),)
    pixels = pixels + load_columns(ptr, stride_w, COUNT, CHANNELS_LAST)
    pixels = pixels + (tl.load(ptr + after * stride_w).to(tl.float32),)
    pixels = scale_columns(pixels, scaling)
    expanded = ()
    for j in tl.static_range(CELL_W):
        left = pixels[first_tap(j, FACTOR)]
        right = pixels[first_tap(j, FACTOR) + 1]
        if first_tap(j, FACTOR) == 0:
            value = tl.fma(right, border[j][1], left * border[j][0])
        else:
            value = tl.fma(right, second_weight(j, FACTOR), left * (1.0 - second_weight(j, FACTOR)))
        expanded = expanded + (value,)
    return expanded
