"""Triton building blocks of Rᵀ, on cells and on single elements.

Sums are gathered in a fixed order, without atomics: the same bits on every run.

On cells a lane walks down its chain once and carries the sums of the source rows that it is
between, so it loads every row of the gradient once, for all sources.
"""

import triton
import triton.language as tl

from .cells import (
    cell_borders,
    cell_pointer,
    first_tap,
    is_bilinear,
    load_columns,
    second_weight,
    store_columns,
)
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
def is_leading(i, factor):
    """Whether output i lies between a cell's start and the centre of its first source pixel."""
    return 0 <= i < factor // 2


@triton.constexpr_function
def is_trailing(i, factor, cell_end):
    """Whether output i lies between the centre of a cell's last source pixel and the cell's end."""
    return cell_end - factor // 2 <= i < cell_end


@triton.constexpr_function
def is_last_of_tap(i, factor):
    """Whether the output after i lies between the next two source pixels."""
    return first_tap(i, factor) != first_tap(i + 1, factor)


@triton.jit
def end_weights(at_start, at_end, FACTOR: tl.constexpr):
    """Weights of a cell's leading outputs in its first source pixel, of the trailing in its last.

    At a border they are 1, because the coordinate is clamped there.
    """
    leading = ()
    trailing = ()
    for j in tl.static_range(FACTOR // 2):
        leading = leading + (tl.where(at_start, 1.0, second_weight(j, FACTOR)),)
        last = 1.0 - second_weight(j + FACTOR // 2, FACTOR)
        trailing = trailing + (tl.where(at_end, 1.0, last),)
    return leading, trailing


@triton.jit
def column_weight(
    weights, j: tl.constexpr, r: tl.constexpr, FACTOR: tl.constexpr, CELL_W: tl.constexpr
):
    """Weight of output j of a row in the gradient of source pixel r, both counted in the cell."""
    if r == 0 and is_leading(j, FACTOR):
        return weights[0][j]
    elif r == CELL_W // FACTOR - 1 and is_trailing(j, FACTOR, CELL_W):
        return weights[1][j - CELL_W + FACTOR // 2]
    elif first_tap(j, FACTOR) == r:
        return second_weight(j, FACTOR)
    else:
        return 1.0 - second_weight(j, FACTOR)


@triton.jit
def load_window(
    ptr, stride_w, in_map, at_left, at_right, HALO: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """CELL_W columns and HALO more on both sides, in float32; zeros outside the map."""
    columns = load_columns(ptr, stride_w, CELL_W, CHANNELS_LAST, in_map)
    if HALO > 0:
        before, after = ptr - HALO * stride_w, ptr + CELL_W * stride_w
        left = load_columns(before, stride_w, HALO, CHANNELS_LAST, in_map & ~at_left)
        right = load_columns(after, stride_w, HALO, CHANNELS_LAST, in_map & ~at_right)
        columns = left + columns + right
    return columns


@triton.jit
def gather_columns(
    window, weights, HALO: tl.constexpr, FACTOR: tl.constexpr, BILINEAR: tl.constexpr,
    CELL_W: tl.constexpr,
):  # fmt: skip
    """The adjoint along the width: CELL_W // FACTOR sums over a row's window."""
    sums = ()
    for r in tl.static_range(CELL_W // FACTOR):
        total = window[HALO + window_start(r, FACTOR, BILINEAR)]
        if BILINEAR:
            total *= column_weight(weights, window_start(r, FACTOR, True), r, FACTOR, CELL_W)
        for t in tl.static_range(1, window_length(FACTOR, BILINEAR)):
            value = window[HALO + window_start(r, FACTOR, BILINEAR) + t]
            if BILINEAR:
                weight = column_weight(
                    weights, window_start(r, FACTOR, True) + t, r, FACTOR, CELL_W
                )
                total = tl.fma(value, weight, total)
            else:
                total += value
        sums = sums + (total,)
    return sums


@triton.jit
def add_scaled(sums, columns, weight):
    """sums + weight·columns, column by column."""
    total = ()
    for j in tl.static_range(len(columns)):
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
def store_result_row(ptr, result, r, columns, alpha, mask, CHANNELS_LAST: tl.constexpr):
    """Store α·columns as row r, counted from the chain's start, if the chain owns it."""
    _, stride_h, stride_w, rows = result
    row_ptr = ptr + r * stride_h
    owned = mask & (r >= 0) & (r < rows)
    store_columns(row_ptr, scaled(columns, alpha), stride_w, owned, CHANNELS_LAST)


@triton.jit
def gather_row(
    carried, result, step, ends, columns, alpha, mask, i: tl.constexpr, FACTOR: tl.constexpr,
    BILINEAR: tl.constexpr, CELL_H: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Add output row i of a step to the sums of the source rows it reaches; store what is complete.

    Rows count from the step's cell on, so some are negative. `carried` are the sums of the source
    rows above and below the output row (bilinear) or of the one it lies in.
    """
    ptr = result[0]
    first_row = step * (CELL_H // FACTOR)
    upper, lower = carried
    if BILINEAR:
        at_top, at_bottom = ends
        if is_trailing(i, FACTOR, 0):
            weight = tl.where(at_bottom, 1.0, 1.0 - second_weight(i, FACTOR))
            upper = add_scaled(upper, columns, weight)
        else:
            upper = add_scaled(upper, columns, 1.0 - second_weight(i, FACTOR))
        if is_leading(i, FACTOR):
            weight = tl.where(at_top, 1.0, second_weight(i, FACTOR))
            lower = add_scaled(lower, columns, weight)
        else:
            lower = add_scaled(lower, columns, second_weight(i, FACTOR))
        if is_last_of_tap(i, FACTOR):
            r = first_row + first_tap(i, FACTOR) - 1
            store_result_row(ptr, result, r, upper, alpha, mask, CHANNELS_LAST)
            upper, lower = lower, zero_columns(len(lower), mask.shape[0])
    else:
        upper = add_scaled(upper, columns, 1.0)
        if i % FACTOR == FACTOR - 1:
            r = first_row + i // FACTOR
            store_result_row(ptr, result, r, upper, alpha, mask, CHANNELS_LAST)
            upper = zero_columns(len(upper), mask.shape[0])
    return upper, lower


@triton.jit
def open_result(
    ptr, strides, UNIT: tl.constexpr, cell, chain, FACTOR: tl.constexpr, BILINEAR: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(pointer, strides, rows of the chain) for storing a result, its weights, and zero sums."""
    ptr = cell_pointer(ptr, strides, UNIT, cell, CELL_H // FACTOR, CELL_W // FACTOR)
    _, _, at_left, at_right = cell_borders(cell)
    result = (ptr, strides[2] * UNIT, strides[3], chain * (CELL_H // FACTOR))
    zeros = zero_columns(CELL_W // FACTOR, BLOCK)
    carried = (zeros, zeros if BILINEAR else ())
    return result, end_weights(at_left, at_right, FACTOR), carried


@triton.jit
def adjoint_cells(
    grad_ptr, grad_strides, GRAD_UNIT: tl.constexpr, result_ptrs, result_strides,
    RESULT_UNITS: tl.constexpr, alpha, mask, cell, chain,
    FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds_k = α·R_kᵀ(grad) for the source pixels of each lane's chain of cells.

    Step g reads the CELL_H rows that start HALO above cell g: a source row is complete once the
    outputs half a source pixel below it are in, so there is one step more than cells.
    """
    HALO: tl.constexpr = largest_halo(FACTORS, MODE)
    _, _, row, _, cells_h, _ = cell
    _, _, at_left, at_right = cell_borders(cell)
    grad_ptr = cell_pointer(grad_ptr, grad_strides, GRAD_UNIT, cell, CELL_H, CELL_W)
    stride_h, stride_w = grad_strides[2] * GRAD_UNIT, grad_strides[3]
    results = ()
    weights = ()
    carried = ()
    for k in tl.static_range(len(FACTORS)):
        result, column_weights, sums = open_result(
            result_ptrs[k], result_strides[k], RESULT_UNITS[k], cell, chain, FACTORS[k],
            is_bilinear(FACTORS[k], MODE), CELL_H, CELL_W, BLOCK,
        )  # fmt: skip
        results = results + (result,)
        weights = weights + (column_weights,)
        carried = carried + (sums,)
    for step in range(chain + (1 if HALO > 0 else 0)):
        ends = (row + step == 0, row + step == cells_h)
        step_ptr = grad_ptr + step * (CELL_H * stride_h)
        for i in tl.static_range(-HALO, CELL_H - HALO):
            in_map = ~ends[0] if i < 0 else ~ends[1]
            window = load_window(
                step_ptr + i * stride_h, stride_w, in_map, at_left, at_right,
                HALO, CELL_W, CHANNELS_LAST,
            )  # fmt: skip
            next_carried = ()
            for k in tl.static_range(len(FACTORS)):
                columns = gather_columns(
                    window, weights[k], HALO, FACTORS[k], is_bilinear(FACTORS[k], MODE), CELL_W
                )
                sums = gather_row(
                    carried[k], results[k], step, ends, columns, alpha, mask, i, FACTORS[k],
                    is_bilinear(FACTORS[k], MODE), CELL_H, CHANNELS_LAST,
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
