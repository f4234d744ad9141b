"""Triton kernels of squeeze-excite's gates and their gradient: products of small matrices.

A program owns a tile [ROWS, COLUMNS] of a result and walks along the terms of its sums, TERMS at a
time. Products are in full float32: tensor cores would round gates to 11 bits. Sums have a fixed
order, without atomics: the same bits on every run.
"""

import triton
import triton.language as tl

from ..norm_act.kernels import activate, activate_with_slope

# The batch: not specialised on, so a new batch size does not recompile.
COUNTS = ("N",)


@triton.jit
def tile_of(pid, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of tile `pid` of a matrix; tiles are numbered row by row."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (pid // blocks).to(tl.int64) * ROWS
    column = (pid % blocks).to(tl.int64) * COLUMNS
    return row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)


@triton.jit
def load_matrix(ptr, i, j, row_stride, column_stride, rows, columns):
    """[i, j] of a matrix (rows, columns); zeros outside."""
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + i[:, None] * row_stride + j[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def inner_gradient(grad_gates, gates):
    """The logits' gradient; the slope is 1/6 where a gate of `gates_of` is neither 0 nor 1."""
    return tl.where((gates > 0.0) & (gates < 1.0), grad_gates * (1.0 / 6.0), 0.0)


@triton.jit
def load_gradients(ptr, gates_ptr, i, j, row_stride, column_stride, rows, columns):
    """[i, j] of a matrix, or, unless `gates_ptr` is None, of the logits' gradients from it."""
    grad = load_matrix(ptr, i, j, row_stride, column_stride, rows, columns)
    if gates_ptr is not None:
        gates = load_matrix(gates_ptr, i, j, row_stride, column_stride, rows, columns)
        grad = inner_gradient(grad, gates)
    return grad


@triton.jit
def product(
    left_ptr, gates_ptr, left_row, left_term, right_ptr, right_term, right_column,
    i, j, rows, columns, terms, TERMS: tl.constexpr,
):  # fmt: skip
    """[i, j] of left (rows, terms) · right (terms, columns), which may lie transposed.

    With `gates_ptr` left is the logits' gradients from those of gates at `left_ptr`.
    """
    sums = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for first in range(0, terms, TERMS):
        k = first + tl.arange(0, TERMS)
        left = load_gradients(left_ptr, gates_ptr, i, k, left_row, left_term, rows, terms)
        right = load_matrix(right_ptr, k, j, right_term, right_column, terms, columns)
        # Added up apart, errors grow with TERMS and not with all terms. Triton would turn a plain +
        # into the first term of the product again.
        sums = tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, sums)
    return sums


@triton.jit
def store_tile(ptr, i, j, rows, columns, values):
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(ptr + i[:, None] * columns + j[None, :], values, mask=mask)


@triton.jit
def logits_tile(values_ptr, weight_ptr, bias_ptr, n, c, N, C, hidden, TERMS: tl.constexpr):
    """[n, c]: values · weightᵀ + bias."""
    logits = product(values_ptr, None, hidden, 1, weight_ptr, 1, hidden, n, c, N, C, hidden, TERMS)
    return logits + tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def gates_of(logits):
    """hardsigmoid, but below 1 wherever its slope is not 0: a gate tells its slope."""
    z = tl.minimum((logits + 3.0) * (1.0 / 6.0), 1.0 - 2.0**-24, tl.PropagateNan.ALL)
    return tl.where(logits <= -3.0, 0.0, tl.where(logits >= 3.0, 1.0, z))


@triton.jit(do_not_specialize=COUNTS)
def _squeeze_kernel(
    values_ptr, before_ptr, means_ptr, weight_ptr, bias_ptr, N, C, hidden, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Hidden values (N, hidden), and the activation's inputs unless `before_ptr` is None."""
    n, h = tile_of(tl.program_id(0), hidden, ROWS, COLUMNS)
    before = logits_tile(means_ptr, weight_ptr, bias_ptr, n, h, N, hidden, C, TERMS)
    if before_ptr is not None:
        store_tile(before_ptr, n, h, N, hidden, before)
    store_tile(values_ptr, n, h, N, hidden, activate(before, ACT))


@triton.jit(do_not_specialize=COUNTS)
def _excite_kernel(
    gates_ptr, values_ptr, weight_ptr, bias_ptr, N, C, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Gates (N, C) from hidden values."""
    n, c = tile_of(tl.program_id(0), C, ROWS, COLUMNS)
    logits = logits_tile(values_ptr, weight_ptr, bias_ptr, n, c, N, C, hidden, TERMS)
    store_tile(gates_ptr, n, c, N, C, gates_of(logits))


@triton.jit(do_not_specialize=COUNTS)
def _excite_backward_kernel(
    grad_logits_ptr, grad_gates_ptr, values_ptr, weight_ptr, bias_ptr, N, C, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits, (N, C), which are computed again."""
    n, c = tile_of(tl.program_id(0), C, ROWS, COLUMNS)
    z = logits_tile(values_ptr, weight_ptr, bias_ptr, n, c, N, C, hidden, TERMS)
    grad = load_matrix(grad_gates_ptr, n, c, C, 1, N, C) * (1.0 / 6.0)
    store_tile(grad_logits_ptr, n, c, N, C, tl.where((z > -3.0) & (z < 3.0), grad, 0.0))


@triton.jit(do_not_specialize=COUNTS)
def _squeeze_backward_kernel(
    grad_before_ptr, grad_logits_ptr, before_ptr, expand_ptr, N, C, hidden, ACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Gradients of the activation's inputs, (N, hidden)."""
    n, h = tile_of(tl.program_id(0), hidden, ROWS, COLUMNS)
    grad = product(grad_logits_ptr, None, C, 1, expand_ptr, hidden, 1, n, h, N, hidden, C, TERMS)
    _, slope = activate_with_slope(load_matrix(before_ptr, n, h, hidden, 1, N, hidden), ACT)
    store_tile(grad_before_ptr, n, h, N, hidden, grad * slope)


@triton.jit
def weight_gradient(
    weight_ptr, bias_ptr, pid, grads_ptr, gates_ptr, inputs_ptr, N, outputs, inputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A tile of gradsᵀ (outputs, N) · inputs (N, inputs); a row's first also sums for the bias.

    For `gates_ptr` see `product`.
    """
    o, i = tile_of(pid, inputs, ROWS, COLUMNS)
    grad = product(
        grads_ptr, gates_ptr, 1, outputs, inputs_ptr, inputs, 1, o, i, outputs, inputs, N, TERMS
    )
    store_tile(weight_ptr, o, i, outputs, inputs, grad)
    if pid % tl.cdiv(inputs, COLUMNS) == 0:
        sums = tl.zeros([ROWS, TERMS], tl.float32)
        for first in range(0, N, TERMS):
            n = first + tl.arange(0, TERMS)
            sums += load_gradients(grads_ptr, gates_ptr, o, n, 1, outputs, outputs, N)
        tl.store(bias_ptr + o, tl.sum(sums, 1), mask=o < outputs)


@triton.jit(do_not_specialize=COUNTS)
def _squeeze_excite_results_kernel(
    grad_means_ptr, grad_reduce_ptr, grad_reduce_bias_ptr, grad_expand_ptr, grad_expand_bias_ptr,
    grad_before_ptr, grad_logits_ptr, means_ptr, values_ptr, reduce_ptr, N, C, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The gradients of means and parameters: tiles of three products, one after the other."""
    pid = tl.program_id(0)
    tiles_means = tl.cdiv(N, ROWS) * tl.cdiv(C, COLUMNS)
    tiles_reduce = tl.cdiv(hidden, ROWS) * tl.cdiv(C, COLUMNS)
    if pid < tiles_means:
        n, c = tile_of(pid, C, ROWS, COLUMNS)
        grad = product(
            grad_before_ptr, None, hidden, 1, reduce_ptr, C, 1, n, c, N, C, hidden, TERMS
        )
        store_tile(grad_means_ptr, n, c, N, C, grad)
    elif pid < tiles_means + tiles_reduce:
        weight_gradient(
            grad_reduce_ptr, grad_reduce_bias_ptr, pid - tiles_means, grad_before_ptr, None,
            means_ptr, N, hidden, C, ROWS, COLUMNS, TERMS,
        )  # fmt: skip
    else:
        weight_gradient(
            grad_expand_ptr, grad_expand_bias_ptr, pid - tiles_means - tiles_reduce,
            grad_logits_ptr, None, values_ptr, N, C, hidden, ROWS, COLUMNS, TERMS,
        )  # fmt: skip
