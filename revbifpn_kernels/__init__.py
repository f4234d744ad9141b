"""Reversible multi-scale networks on fused cross-scale resample-add kernels."""

from . import _extension, models  # noqa: F401  (_extension first: it registers the C++ kernels)
from .blocks import Recomputed, RevBlock, RevLevels
from .capture import capture_step
from .mbconv import MBConv
from .mbconv.synchronised import convert_sync_batchnorm
from .models import *  # noqa: F403
from .ops import resample_add, resample_add_, resample_adjoint, resample_undo
from .reversible import Reversible, ReversibleSequential
from .silo import RevSilo

__version__ = "0.1.0"

__all__ = [
    "MBConv",
    "Recomputed",
    "RevBlock",
    "RevLevels",
    "RevSilo",
    "Reversible",
    "ReversibleSequential",
    "capture_step",
    "convert_sync_batchnorm",
    "resample_add",
    "resample_add_",
    "resample_adjoint",
    "resample_undo",
]
__all__ += models.__all__
