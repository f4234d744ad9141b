"""Fused cross-scale resampling: add, its adjoint, and undo, which is both."""
