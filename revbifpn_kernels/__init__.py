"""Fused cross-scale resample-add for reversible multi-scale networks, in Triton and C++."""

from . import _extension  # noqa: F401  (before all else: registers the C++ kernels)
from .ops import resample_add, resample_add_, resample_adjoint, resample_undo

__version__ = "0.1.0"

__all__ = [
    "resample_add",
    "resample_add_",
    "resample_adjoint",
    "resample_undo",
]
