"""Triton building blocks: the two layers of squeeze-excite for one image, by one program.

Both layers together are called the *network* here. Its weights are small (`is_small`) and come from
the L2 cache; hidden values [HIDDEN] stay in registers. To round less, TERMS products are added to
each other before they are added to the total, as in kernels.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..last_program import is_last
from ..norm_act.kernels import activate, activate_with_slope
from .kernels import gates_of, inner_gradient

# Most bytes of both weights, and the longest hidden vector, for which a program computes the
# network of an image. Counted by hand: not yet tuned on a GPU.
SMALL_BYTES, MOST_HIDDEN = 256 * 1024, 128
# Weights that a program loads at once. With 2048 the kernels need up to 40 more registers than they
# would without the network, on sm_90 (Triton 3.7.0).
TILE = 1024
# Chunks and channels whose parts a program loads at once.
CHUNKS, COLUMNS = tl.constexpr(32), tl.constexpr(32)


def is_small(reduce_weight: Tensor) -> bool:
    """Whether a program should compute the network of an image by itself."""
    hidden = len(reduce_weight)
    return 2 * reduce_weight.numel() * 4 <= SMALL_BYTES and 0 < hidden <= MOST_HIDDEN


def image_constants(reduce_weight: Tensor) -> dict[str, int]:
    """Compile-time sizes of a program that computes the network of an image."""
    hidden = triton.next_power_of_2(len(reduce_weight))
    return {"HIDDEN": hidden, "TERMS": TILE // hidden}


@triton.jit
def images_to_finish(counters_ptr, blocks, chunks, images, N):
    """The first image and the end of those that this program finishes, as the last of its group."""
    programs = blocks * chunks
    group = tl.program_id(0) // programs
    first = group.to(tl.int64) * images
    end = tl.minimum(first + images, N)
    return first, end if is_last(counters_ptr, group, programs) else first


@triton.jit
def add_chunks(sums_ptr, parts_ptr, n, N, C, chunks, ROWS: tl.constexpr):
    """Image n of sums (ROWS, N, C) from parts (chunks, ROWS, N, C)."""
    size = N.to(tl.int64) * C
    chunk = tl.arange(0, CHUNKS)[:, None]
    for row in tl.static_range(ROWS):
        for first in range(0, C, COLUMNS):
            c = first + tl.arange(0, COLUMNS)[None, :]
            offset = (row * N + n) * C + c
            totals = tl.zeros([CHUNKS, COLUMNS], tl.float32)
            for begin in range(0, chunks, CHUNKS):
                ptr = parts_ptr + (begin + chunk).to(tl.int64) * (ROWS * size) + offset
                mask = (c < C) & (begin + chunk < chunks)
                totals += tl.load(ptr, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(sums_ptr + offset, tl.sum(totals, 0, keep_dims=True), mask=c < C)
    tl.debug_barrier()


@triton.jit
def load_row(ptr, n, c, C):
    """Row n of a matrix (N, C) that programs of this launch have written."""
    return tl.load(ptr + n * C + c, mask=c < C, other=0.0, cache_modifier=".cg")


@triton.jit
def load_weights(ptr, i, j, rows, columns):
    """[i, j] of a matrix (rows, columns); zeros outside."""
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + i[:, None] * columns + j[None, :], mask=mask, other=0.0)


@triton.jit
def gates_of_image(
    gates_ptr, means_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr, expand_bias_ptr,
    n, C, hidden, ACT: tl.constexpr, HIDDEN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Stores the gates of image n."""
    h = tl.arange(0, HIDDEN)
    before = tl.load(reduce_bias_ptr + h, mask=h < hidden, other=0.0)
    for first in range(0, C, TERMS):
        c = first + tl.arange(0, TERMS)
        weights = load_weights(reduce_ptr, h, c, hidden, C)
        before += tl.sum(weights * load_row(means_ptr, n, c, C)[None, :], 1)
    values = activate(before, ACT)
    for first in range(0, C, TERMS):
        c = first + tl.arange(0, TERMS)
        weights = load_weights(expand_ptr, c, h, C, hidden)
        bias = tl.load(expand_bias_ptr + c, mask=c < C, other=0.0)
        gates = gates_of(tl.sum(weights * values[None, :], 1) + bias)
        tl.store(gates_ptr + n * C + c, gates, mask=c < C)


@triton.jit
def gradient_of_image(
    grad_means_ptr, values_ptr, grad_before_ptr, grad_gates_ptr, gates_ptr, means_ptr,
    reduce_ptr, reduce_bias_ptr, expand_ptr,
    n, C, hidden, ACT: tl.constexpr, HIDDEN: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Stores image n of the means' gradient and, for the weights', of values and grad_before."""
    h = tl.arange(0, HIDDEN)
    before = tl.load(reduce_bias_ptr + h, mask=h < hidden, other=0.0)
    grad = tl.zeros([HIDDEN], tl.float32)
    for first in range(0, C, TERMS):
        c = first + tl.arange(0, TERMS)
        weights = load_weights(reduce_ptr, h, c, hidden, C)
        before += tl.sum(weights * load_row(means_ptr, n, c, C)[None, :], 1)
        gates = tl.load(gates_ptr + n * C + c, mask=c < C, other=0.0)
        grad_logits = inner_gradient(load_row(grad_gates_ptr, n, c, C), gates)
        grad += tl.sum(load_weights(expand_ptr, c, h, C, hidden) * grad_logits[:, None], 0)
    values, slope = activate_with_slope(before, ACT)
    grad *= slope
    tl.store(values_ptr + n * hidden + h, values, mask=h < hidden)
    tl.store(grad_before_ptr + n * hidden + h, grad, mask=h < hidden)
    for first in range(0, C, TERMS):
        c = first + tl.arange(0, TERMS)
        weights = load_weights(reduce_ptr, h, c, hidden, C)
        tl.store(grad_means_ptr + n * C + c, tl.sum(weights * grad[:, None], 0), mask=c < C)
