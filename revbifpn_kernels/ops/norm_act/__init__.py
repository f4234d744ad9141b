"""Batch norm, activation and gate: statistics, forward, gradient; a norm as scale and shift."""

from . import factors, forward, gradient, statistics, sums  # noqa: F401  (registers their ops)
