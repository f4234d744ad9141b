"""Triton building blocks of the ops' kernels.

cells     the fast path: a lane (thread) owns a cell of up to 8×8 outputs, or a chain of cells
add       x + α·Σ R(s) on cells, and on single elements
adjoint   α·Rᵀ(grad) on chains of cells, and on single elements
taps      single elements of any sizes and strides
"""
