"""Triton building blocks of Rᵀ, on cells and on single elements.

Sums are gathered in a fixed order, without atomics: the same bits on every run.

On cells a lane walks down its chain once and carries the sums of the source rows that it is
between, so it loads every row of the gradient once, for all sources. In nchw it sums over rows
first; once a source row is complete, over columns, and exchanges what reaches past its cell with
the lanes beside. In channels_last it loads a halo of columns and sums over them first.
"""

import triton
import triton.language as tl

from ...tiling import shown
from .cells import (
    cell_pointer,
    first_tap,
    is_bilinear,
    is_half,
    load_columns,
    second_weight,
    store_columns,
)
from .lanes import is_left_half, lanes_beside, side_borders, take_lanes
from .taps import bilinear_gradient_weight, element_pointer, first_output, nearest_gradient_weight


@triton.constexpr_function
def largest_halo(factors, mode):
    """Rows and columns of outputs beyond a cell that reach its source pixels."""
    return max(factor // 2 if mode == "bilinear" and factor > 1 else 0 for factor in factors)


@triton.constexpr_function
def window_start(r, factor, bilinear):
    """The first output of a cell that reaches its source pixel r."""
    return r * factor - (factor // 2 if bilinear else 0)


@triton.constexpr_function
def window_length(factor, bilinear):
    """How many outputs in a row reach a source pixel."""
    return 2 * factor if bilinear else factor


@triton.constexpr_function
def completed_row(i, factor, bilinear):
    """The source row that output row i is the last to reach, both counted in a cell; or None."""
    if bilinear:
        tap = first_tap(i, factor)
        return tap - 1 if first_tap(i + 1, factor) != tap else None
    return i // factor if i % factor == factor - 1 else None


@triton.constexpr_function
def column_weight(j, r, factor):
    """Weight of output j of a row in the gradient of source pixel r, both counted in the cell."""
    return second_weight(j, factor) if first_tap(j, factor) == r else 1 - second_weight(j, factor)


@triton.jit
def load_window(ptr, stride_w, cell, HALO: tl.constexpr, CELL_W: tl.constexpr):
    """CELL_W columns and HALO more on both sides, in channels_last; mirrored at the map's borders.

    A coordinate is clamped at a border, and the weight that clamping adds to the pixel there is
    that of the mirrored output.
    """
    at_left, at_right = side_borders(cell)
    columns = ()
    for j in tl.static_range(CELL_W):
        columns = columns + (tl.load(ptr + j * stride_w),)
    window = ()
    for j in tl.static_range(-HALO, CELL_W + HALO):
        if j < 0:
            value = tl.load(ptr + j * stride_w, mask=~at_left, other=columns[-1 - j])
        elif j >= CELL_W:
            inside = columns[2 * CELL_W - 1 - j]
            value = tl.load(ptr + j * stride_w, mask=~at_right, other=inside)
        else:
            value = columns[j]
        window = window + (value.to(tl.float32),)
    return window


@triton.jit
def gather_pixel(
    row, r: tl.constexpr, HALO: tl.constexpr, FACTOR: tl.constexpr, BILINEAR: tl.constexpr,
    CELL_W: tl.constexpr,
):  # fmt: skip
    """The adjoint along the width for source pixel r of a cell.

    A weighted sum over what `row` has of the outputs that reach the pixel: `row` holds the cell's
    CELL_W columns and HALO more on both sides.
    """
    start: tl.constexpr = tl.constexpr(max(window_start(r, FACTOR, BILINEAR), -HALO))
    end: tl.constexpr = tl.constexpr(
        min(window_start(r, FACTOR, BILINEAR) + window_length(FACTOR, BILINEAR), CELL_W + HALO)
    )
    total = row[HALO + start]
    if BILINEAR:
        total *= column_weight(start, r, FACTOR)
    for j in tl.static_range(start + 1, end):
        if BILINEAR:
            total = tl.fma(row[HALO + j], column_weight(j, r, FACTOR), total)
        else:
            total += row[HALO + j]
    return total


@triton.jit
def gather_columns(
    row, HALO: tl.constexpr, FACTOR: tl.constexpr, BILINEAR: tl.constexpr, CELL_W: tl.constexpr
):
    """`gather_pixel` for all CELL_W // FACTOR source pixels of a cell."""
    pixels = ()
    for r in tl.static_range(CELL_W // FACTOR):
        pixels = pixels + (gather_pixel(row, r, HALO, FACTOR, BILINEAR, CELL_W),)
    return pixels


@triton.jit
def gather_beside(row, cell, FACTOR: tl.constexpr, BILINEAR: tl.constexpr, CELL_W: tl.constexpr):
    """The adjoint along the width where lanes hold neighbouring cells and no halo.

    What a cell's outputs give to the pixels before and after it goes to the lanes beside; at the
    map's borders it stays.
    """
    pixels = gather_columns(row, 0, FACTOR, BILINEAR, CELL_W)
    if BILINEAR:
        at_left, at_right = side_borders(cell)
        _, before, after = lanes_beside(cell)
        to_left = gather_pixel(row, -1, 0, FACTOR, True, CELL_W)
        to_right = gather_pixel(row, CELL_W // FACTOR, 0, FACTOR, True, CELL_W)
        from_left = tl.where(at_left, to_left, take_lanes(to_right, before))
        from_right = tl.where(at_right, to_right, take_lanes(to_left, after))
        if len(pixels) == 1:
            pixels = (pixels[0] + from_left + from_right,)
        else:
            pixels = (pixels[0] + from_left,) + pixels[1:-1] + (pixels[-1] + from_right,)
    return pixels


@triton.jit
def gather_halves(row, cell, FACTOR: tl.constexpr, BILINEAR: tl.constexpr, CELL_W: tl.constexpr):
    """As `gather_beside`, where two cells share a source pixel: the sum is the same in both."""
    is_left = is_left_half(cell)
    _, before, after = lanes_beside(cell)
    if BILINEAR:
        at_left, at_right = side_borders(cell)
        # The left cell's outputs also reach the pixel before, the right one's the pixel after.
        own = tl.zeros_like(row[0])
        outer = own
        for j in tl.static_range(CELL_W):
            to_left, to_right = second_weight(j, FACTOR), 1.0 - second_weight(j + CELL_W, FACTOR)
            own = tl.fma(row[j], tl.where(is_left, to_left, to_right), own)
            outer = tl.fma(row[j], tl.where(is_left, 1.0 - to_left, 1.0 - to_right), outer)
        received = take_lanes(outer, tl.where(is_left, before, after))
        own += tl.where(at_left | at_right, outer, received)
    else:
        own = row[0]
        for j in tl.static_range(1, CELL_W):
            own += row[j]
    return (own + take_lanes(own, tl.where(is_left, after, before)),)


@triton.jit
def add_scaled(sums, columns, weight):
    """sums + weight·columns, column by column; `sums` may be empty."""
    total = ()
    for j in tl.static_range(len(columns)):
        if len(sums) == 0:
            total = total + (columns[j] * weight,)
        else:
            total = total + (tl.fma(columns[j], weight, sums[j]),)
    return total


@triton.jit
def scaled(columns, factor):
    products = ()
    for j in tl.static_range(len(columns)):
        products = products + (columns[j] * factor,)
    return products


@triton.jit
def zero_columns(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
def store_result_row(
    sums, result, r, alpha, owned, FACTOR: tl.constexpr, BILINEAR: tl.constexpr,
    CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Store α·sums as row r, counted from the chain's start, where `owned`.

    The sums are over rows; in nchw those over columns follow here, once per row of the result.
    """
    ptr, stride_h, stride_w, cell = result
    if is_half(FACTOR, CELL_W):
        owned &= is_left_half(cell)
        sums = gather_halves(sums, cell, FACTOR, BILINEAR, CELL_W)
    elif not CHANNELS_LAST:
        sums = gather_beside(sums, cell, FACTOR, BILINEAR, CELL_W)
    store_columns(ptr + r * stride_h, scaled(sums, alpha), stride_w, owned, CHANNELS_LAST)


@triton.jit
def gather_row(
    carried, row, result, step, alpha, owned, i: tl.constexpr, FACTOR: tl.constexpr,
    BILINEAR: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Add output row i of a step to the sums of the source rows it reaches; store what is complete.

    Rows count from the step's cell on, so some are negative. `carried` are the sums of the source
    rows above and below the output row (bilinear) or of the one it lies in. `owned` says whether
    to store rows of the cell above, and rows of this one.
    """
    upper, lower = carried
    if BILINEAR:
        upper = add_scaled(upper, row, 1.0 - second_weight(i, FACTOR))
        lower = add_scaled(lower, row, second_weight(i, FACTOR))
    else:
        upper = add_scaled(upper, row, 1.0)
    r: tl.constexpr = completed_row(i, FACTOR, BILINEAR)
    if r is not None:
        store_result_row(
            upper, result, step * (CELL_H // FACTOR) + r, alpha, owned[0] if r < 0 else owned[1],
            FACTOR, BILINEAR, CELL_W, CHANNELS_LAST,
        )  # fmt: skip
        upper, lower = lower, ()
    return upper, lower


@triton.jit
def open_result(
    ptr, strides, UNIT: tl.constexpr, cell, HALO: tl.constexpr, FACTOR: tl.constexpr,
    BILINEAR: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(pointer, strides, cell) for storing a result, and the sums that a step starts with.

    In nchw sums are carried per output column, in channels_last per source pixel.
    """
    ptr = cell_pointer(ptr, strides, UNIT, cell, FACTOR, CELL_H, CELL_W)
    zeros = zero_columns(CELL_W // FACTOR if CHANNELS_LAST else CELL_W, BLOCK)
    # A source row that the step's first output row is the first to reach has no sums yet.
    is_new: tl.constexpr = completed_row(-HALO - 1, FACTOR, BILINEAR) is not None
    last = () if is_new else zeros
    carried = (zeros, last) if BILINEAR else (last, ())
    return (ptr, shown(strides[2]) * UNIT, strides[3], cell), carried


@triton.jit
def adjoint_cells(
    grad_ptr, grad_strides, GRAD_UNIT: tl.constexpr, result_ptrs, result_strides,
    RESULT_UNITS: tl.constexpr, alpha, mask, cell, chain,
    FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds_k = α·R_kᵀ(grad) for the source pixels of each lane's chain of cells.

    Step g reads the CELL_H rows that start HALO above cell g: a source row is complete once the
    outputs half a source pixel below it are in, so there is one step more than cells. Rows beyond
    the map are mirrored, as columns in `load_window`.
    """
    HALO: tl.constexpr = largest_halo(FACTORS, MODE)
    _, _, row, _, cells_h, _ = cell
    grad_ptr = cell_pointer(grad_ptr, grad_strides, GRAD_UNIT, cell, 1, CELL_H, CELL_W)
    stride_h, stride_w = shown(grad_strides[2]) * GRAD_UNIT, grad_strides[3]
    results = ()
    carried = ()
    for k in tl.static_range(len(FACTORS)):
        result, sums = open_result(
            result_ptrs[k], result_strides[k], RESULT_UNITS[k], cell, HALO, FACTORS[k],
            is_bilinear(FACTORS[k], MODE), CELL_H, CELL_W, CHANNELS_LAST, BLOCK,
        )  # fmt: skip
        results = results + (result,)
        carried = carried + (sums,)
    for step in range(chain + (1 if HALO > 0 else 0)):
        owned = (mask & (step > 0), mask & (step < chain))
        at_top, at_bottom = row + step == 0, row + step == cells_h
        step_ptr = grad_ptr + step * (CELL_H * stride_h)
        for i in tl.static_range(-HALO, CELL_H - HALO):
            row_ptr = step_ptr + tl.where(at_top if i < 0 else at_bottom, -1 - i, i) * stride_h
            if CHANNELS_LAST:
                outputs = load_window(row_ptr, stride_w, cell, HALO, CELL_W)
            else:
                outputs = load_columns(row_ptr, stride_w, CELL_W, False)
            next_carried = ()
            for k in tl.static_range(len(FACTORS)):
                columns = outputs
                if CHANNELS_LAST:
                    columns = gather_columns(
                        outputs, HALO, FACTORS[k], is_bilinear(FACTORS[k], MODE),
                        CELL_W,
                    )  # fmt: skip
                sums = gather_row(
                    carried[k], columns, results[k], step, alpha, owned, i, FACTORS[k],
                    is_bilinear(FACTORS[k], MODE), CELL_H, CELL_W, CHANNELS_LAST,
                )  # fmt: skip
                next_carried = next_carried + (sums,)
            carried = next_carried


@triton.jit
def gather_outputs(
    grad_ptr, strides, n, c, r, q, size, ratios, H, W, SUPPORT_H, SUPPORT_W, KIND: tl.constexpr,
):  # fmt: skip
    """Rᵀ(grad) at each lane's source pixel (r, q): a weighted sum over the outputs it reaches."""
    h, w = size
    total = tl.zeros(r.shape, tl.float32)
    first_i = first_output(r, h, H)
    first_j = first_output(q, w, W)
    for a in range(SUPPORT_H):
        i = first_i + a
        for b in range(SUPPORT_W):
            j = first_j + b
            if KIND == "bilinear":
                weight_i = bilinear_gradient_weight(i, r, h, H)
                weight = weight_i * bilinear_gradient_weight(j, q, w, W)
            else:
                weight_i = nearest_gradient_weight(i, r, h, H, ratios[0])
                weight = weight_i * nearest_gradient_weight(j, q, w, W, ratios[1])
            reached = (i < H) & (j < W) & (weight > 0)
            ptr = element_pointer(grad_ptr, strides, n, c, i, j)
            value = tl.load(ptr, mask=reached, other=0.0).to(tl.float32)
            total = tl.fma(value, weight, total)
    return total
