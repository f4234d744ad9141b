"""Reversible bidirectional feature pyramids (RevSilo, RevBiFPN) with fused Triton and C++ kernels."""

import torch

from ._build_check import require_supported_torch

require_supported_torch(torch.__version__)

try:
    from . import _C  # noqa: F401  (importing it registers the C++ kernels)
except ImportError as error:
    from ._build_check import MISSING_EXTENSION

    raise ImportError(MISSING_EXTENSION.format(reason=error)) from error

from .ops import resample_add, resample_add_, resample_adjoint, resample_undo

__version__ = "0.1.0"

__all__ = [
    "resample_add",
    "resample_add_",
    "resample_adjoint",
    "resample_undo",
]
