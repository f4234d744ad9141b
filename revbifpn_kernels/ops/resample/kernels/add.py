"""Triton building blocks of x + α·Σ_k R_k(s_k), on cells and on single elements.

Both do the same operations in the same order, source by source, so they compute the same bits.
"""

import triton
import triton.language as tl

from ...tiling import shown
from .cells import (
    border_weights,
    cell_pointer,
    expand_row,
    first_tap,
    halo_offsets,
    is_bilinear,
    join_columns,
    load_columns,
    pixels_along,
    scale_columns,
    scale_value,
    second_weight,
)
from .taps import bilinear_taps, element_pointer, nearest_tap


@triton.jit
def add_bilinear_row(sums, top, bottom, first, second):
    """sums + first·top + second·bottom, column by column; `sums` may be empty."""
    blended = ()
    for j in tl.static_range(len(top)):
        if len(sums) == 0:
            blended = blended + (tl.fma(bottom[j], second, top[j] * first),)
        else:
            blended = blended + (tl.fma(bottom[j], second, tl.fma(top[j], first, sums[j])),)
    return blended


@triton.jit
def add_nearest_row(sums, pixels, FACTOR: tl.constexpr, CELL_W: tl.constexpr):
    """sums + each pixel repeated FACTOR times; `sums` may be empty."""
    added = ()
    for j in tl.static_range(CELL_W):
        if len(sums) == 0:
            added = added + (pixels[j // FACTOR],)
        else:
            added = added + (sums[j] + pixels[j // FACTOR],)
    return added


@triton.jit
def round_to_multiple(value, lattice):
    """`value` rounded to a multiple of lattice[0], whose inverse is lattice[1]; ties to even."""
    steps = value * lattice[1]
    # Adding 2²³ leaves no fraction bits; from 2²³ on float32 has none, and NaN and infinity stay.
    whole = (tl.abs(steps) + 8388608.0) - 8388608.0
    whole = tl.where(steps < 0, -whole, whole)
    return tl.where(tl.abs(steps) < 8388608.0, whole * lattice[0], value)


@triton.jit
def add_update(x, sums, alpha, lattice, HAS_LATTICE: tl.constexpr):
    """x + α·sums in float32, α·sums rounded to the lattice if there is one."""
    x = x.to(tl.float32)
    if HAS_LATTICE:
        return x + round_to_multiple(sums * alpha, lattice)
    else:
        return tl.fma(sums, alpha, x)


@triton.jit
def open_source(
    ptr, strides, UNIT: tl.constexpr, scaling, cell, FACTOR: tl.constexpr, MODE: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(pointer, strides, cell, scaling) for reading a source, and the rows around the first one."""
    _, _, row, _, cells_h, _ = cell
    ptr = cell_pointer(ptr, strides, UNIT, cell, FACTOR, CELL_H, CELL_W)
    stride_h = shown(strides[2]) * UNIT
    rows = ()
    if is_bilinear(FACTOR, MODE):
        above, _ = halo_offsets(row == 0, row == cells_h - 1, CELL_H // FACTOR)
        halo_ptr = ptr + above * stride_h
        halo = expand_row(halo_ptr, strides[3], cell, scaling, FACTOR, CELL_W, CHANNELS_LAST)
        first = expand_row(ptr, strides[3], cell, scaling, FACTOR, CELL_W, CHANNELS_LAST)
        rows = (halo, first)
    return (ptr, stride_h, strides[3], cell, scaling), rows


@triton.jit
def read_pixels(
    source, step, r: tl.constexpr, FACTOR: tl.constexpr, CELL_H: tl.constexpr,
    CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Source row r of a step's cell, scaled, as it is."""
    ptr, stride_h, stride_w, _, scaling = source
    ptr += (step * (CELL_H // FACTOR) + r) * stride_h
    pixels = load_columns(ptr, stride_w, pixels_along(FACTOR, CELL_W), CHANNELS_LAST)
    return scale_columns(pixels, scaling)


@triton.jit
def read_row(
    source, step, at_bottom, r: tl.constexpr, FACTOR: tl.constexpr, CELL_H: tl.constexpr,
    CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Source row r of a step's cell, expanded; the one below the map's last row is that row."""
    ptr, stride_h, stride_w, cell, scaling = source
    if r == CELL_H // FACTOR:
        offset = step * r + tl.where(at_bottom, r - 1, r)
    else:
        offset = step * (CELL_H // FACTOR) + r
    return expand_row(
        ptr + offset * stride_h, stride_w, cell, scaling, FACTOR, CELL_W, CHANNELS_LAST
    )


@triton.jit
def add_row(
    sums, source, rows, step, ends, i: tl.constexpr, FACTOR: tl.constexpr, MODE: tl.constexpr,
    CELL_H: tl.constexpr, CELL_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """sums + row i of the resampled source, and the source rows that the next row needs."""
    at_top, at_bottom = ends
    if not is_bilinear(FACTOR, MODE):
        pixels = rows
        if i % FACTOR == 0:
            pixels = read_pixels(source, step, i // FACTOR, FACTOR, CELL_H, CELL_W, CHANNELS_LAST)
        # Not carried to the next cell.
        rows = pixels if i < CELL_H - 1 else ()
        return add_nearest_row(sums, pixels, FACTOR, CELL_W), rows
    elif first_tap(i, FACTOR) == 0:
        first, second = border_weights(at_top, FACTOR)[i]
        return add_bilinear_row(sums, rows[0], rows[1], first, second), rows
    else:
        if first_tap(i, FACTOR) != first_tap(i - 1, FACTOR):
            r: tl.constexpr = first_tap(i, FACTOR)
            next_row = read_row(source, step, at_bottom, r, FACTOR, CELL_H, CELL_W, CHANNELS_LAST)
            rows = (rows[1], next_row)
        first, second = 1.0 - second_weight(i, FACTOR), second_weight(i, FACTOR)
        return add_bilinear_row(sums, rows[0], rows[1], first, second), rows


@triton.jit
def write_row(
    y_ptr, y_stride_w, x_ptr, x_stride_w, sums, alpha, lattice, mask,
    HAS_LATTICE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One row of each lane's cell: y = x + α·sums."""
    if CHANNELS_LAST:
        for j in tl.static_range(len(sums)):
            x = tl.load(x_ptr + j * x_stride_w, mask=mask)
            y = add_update(x, sums[j], alpha, lattice, HAS_LATTICE)
            tl.store(y_ptr + j * y_stride_w, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        columns = tl.arange(0, len(sums))[None, :]
        x = tl.load(x_ptr[:, None] + columns, mask=mask[:, None])
        y = add_update(x, join_columns(sums), alpha, lattice, HAS_LATTICE)
        tl.store(y_ptr[:, None] + columns, y.to(y_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def add_cells(
    y_ptr, y_strides, Y_UNIT: tl.constexpr, x_ptr, x_strides, X_UNIT: tl.constexpr,
    source_ptrs, source_strides, SOURCE_UNITS: tl.constexpr, scaling, alpha, lattice, mask, cell,
    chain, FACTORS: tl.constexpr, MODE: tl.constexpr, CELL_H: tl.constexpr, CELL_W: tl.constexpr,
    HAS_LATTICE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y = x + α·Σ_k R_k(s_k) on each lane's chain of cells, row by row.

    A lane carries the two expanded rows of each source that its output row lies between, so it
    expands each source row once.
    """
    _, _, row, _, cells_h, _ = cell
    x_ptr = cell_pointer(x_ptr, x_strides, X_UNIT, cell, 1, CELL_H, CELL_W)
    y_ptr = cell_pointer(y_ptr, y_strides, Y_UNIT, cell, 1, CELL_H, CELL_W)
    x_stride_h, y_stride_h = shown(x_strides[2]) * X_UNIT, shown(y_strides[2]) * Y_UNIT
    sources = ()
    rows = ()
    for k in tl.static_range(len(FACTORS)):
        source, first_rows = open_source(
            source_ptrs[k], source_strides[k], SOURCE_UNITS[k], scaling[k], cell,
            FACTORS[k], MODE, CELL_H, CELL_W, CHANNELS_LAST,
        )  # fmt: skip
        sources = sources + (source,)
        rows = rows + (first_rows,)
    for step in range(chain):
        ends = (row + step == 0, row + step == cells_h - 1)
        for i in tl.static_range(CELL_H):
            sums = ()
            next_rows = ()
            for k in tl.static_range(len(FACTORS)):
                sums, carried = add_row(
                    sums, sources[k], rows[k], step, ends, i, FACTORS[k], MODE, CELL_H, CELL_W,
                    CHANNELS_LAST,
                )  # fmt: skip
                next_rows = next_rows + (carried,)
            rows = next_rows
            write_row(
                y_ptr + (step * CELL_H + i) * y_stride_h, y_strides[3],
                x_ptr + (step * CELL_H + i) * x_stride_h, x_strides[3],
                sums, alpha, lattice, mask, HAS_LATTICE, CHANNELS_LAST,
            )  # fmt: skip


@triton.jit
def blend_columns(ptr, stride_w, scaling, j_0, j_1, weight):
    first = tl.load(ptr + j_0.to(tl.int64) * stride_w).to(tl.float32)
    second = tl.load(ptr + j_1.to(tl.int64) * stride_w).to(tl.float32)
    first, second = scale_value(first, scaling), scale_value(second, scaling)
    return tl.fma(second, weight, first * (1.0 - weight))


@triton.jit
def add_resampled(sums, ptr, strides, size, ratios, scaling, place, H, W, KIND: tl.constexpr):
    """sums + R(source) at each lane's place, for one source of any size.

    `ratios` are the source's sides over the target's; `scaling` is (scale, shift) of its values.
    """
    n, c, i, j = place
    h, w = size
    if KIND == "bilinear":
        i_0, i_1, weight_h = bilinear_taps(i, h, H)
        j_0, j_1, weight_w = bilinear_taps(j, w, W)
        zero = tl.zeros_like(j)
        top_ptr = element_pointer(ptr, strides, n, c, i_0, zero)
        bottom_ptr = element_pointer(ptr, strides, n, c, i_1, zero)
        top = blend_columns(top_ptr, strides[3], scaling, j_0, j_1, weight_w)
        bottom = blend_columns(bottom_ptr, strides[3], scaling, j_0, j_1, weight_w)
        sums = tl.fma(bottom, weight_h, tl.fma(top, 1.0 - weight_h, sums))
    elif KIND == "area":
        rows, columns = h // H, w // W
        total = tl.zeros_like(sums)
        for a in range(rows):
            for b in range(columns):
                pixel = element_pointer(ptr, strides, n, c, i * rows + a, j * columns + b)
                total += tl.load(pixel).to(tl.float32)
        mean = tl.div_rn(total, tl.zeros_like(total) + rows * columns)
        sums += scale_value(mean, scaling)
    else:
        if KIND == "nearest":
            i = nearest_tap(i, h, H, ratios[0])
            j = nearest_tap(j, w, W, ratios[1])
        value = tl.load(element_pointer(ptr, strides, n, c, i, j)).to(tl.float32)
        sums += scale_value(value, scaling)
    return sums
