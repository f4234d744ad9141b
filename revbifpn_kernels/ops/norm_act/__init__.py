"""Batch norm, activation and gate: statistics, result, gradient."""
