"""Triton building blocks that say which cells the lanes hold, and exchange values between lanes."""

import triton
import triton.language as tl

# Lanes that exchange values by warp shuffles; it divides the warp of every GPU.
GROUP = tl.constexpr(32)


@triton.jit
def locate(number, C, rows, columns, CHANNELS_LAST: tl.constexpr):
    """(n, c, row, column) of what `number` counts: neighbours in memory follow each other."""
    if CHANNELS_LAST:
        c = number % C
        number = number // C
    column = number % columns
    number = number // columns
    row = number % rows
    n = number // rows
    if not CHANNELS_LAST:
        c = n % C
        n = n // C
    return n, c, row, column


@triton.jit
def locate_cells(
    lanes, C, cells_h, cells_w, chain, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Which lanes of this program own a chain of cells, and the first cell of each lane's chain.

    A cell is the tuple (n, c, row, column, cells_h, cells_w). With OVERLAP the outer lanes of each
    group hold what the groups beside it own, so that all owned cells have their neighbours.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owned = lane < lanes
    if OVERLAP:
        place = lane % GROUP
        lane = lane // GROUP * (GROUP - 2) + place - 1
        owned = (lane < lanes) & (place > 0) & (place < GROUP - 1)
        lane = tl.maximum(lane, 0)
    # Clamped, every load is in bounds: only stores need the mask.
    number = tl.minimum(lane, lanes - 1)
    n, c, row, col = locate(number, C, cells_h // chain, cells_w, CHANNELS_LAST)
    return owned, (n.to(tl.int64), c.to(tl.int64), row * chain, col, cells_h, cells_w)


@triton.jit
def side_borders(cell):
    """Whether each lane's cell lies at the left and at the right border of its map."""
    _, _, _, col, _, cells_w = cell
    return col == 0, col == cells_w - 1


@triton.jit
def is_left_half(cell):
    """Whether each lane's cell is the left one of two that share a source pixel."""
    return cell[3] % 2 == 0


@triton.jit
def lanes_beside(cell):
    """The places in its group of each lane and of those with the cells before and after its own."""
    place = tl.arange(0, cell[3].shape[0]) % GROUP
    return place, tl.maximum(place - 1, 0), tl.minimum(place + 1, GROUP - 1)


@triton.jit
def take_lanes(values, places):
    """values[places] in each group of lanes."""
    GROUPS: tl.constexpr = values.shape[0] // GROUP
    places = tl.reshape(places, [GROUPS, GROUP])
    taken = tl.gather(tl.reshape(values, [GROUPS, GROUP]), places, axis=1)
    return tl.reshape(taken, [GROUPS * GROUP])
