"""Reversible multi-scale networks on fused cross-scale resample-add kernels."""

from . import _extension  # noqa: F401  (before all else: registers the C++ kernels)
from .blocks import MBConv, RevBlock, RevLevels
from .ops import resample_add, resample_add_, resample_adjoint, resample_undo
from .reversible import Reversible, ReversibleSequential
from .silo import RevSilo

__version__ = "0.1.0"

__all__ = [
    "MBConv",
    "RevBlock",
    "RevLevels",
    "RevSilo",
    "Reversible",
    "ReversibleSequential",
    "resample_add",
    "resample_add_",
    "resample_adjoint",
    "resample_undo",
]
