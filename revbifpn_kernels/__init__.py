"""Reversible multi-scale networks on fused cross-scale resample-add kernels."""

from . import _extension  # noqa: F401  (before all else: registers the C++ kernels)
from .blocks import Recomputed, RevBlock, RevLevels
from .mbconv import MBConv
from .models import (
    SIZES,
    Config,
    DetectionBackbone,
    RevBiFPN,
    create_model,
    load_official,
    macs,
    revbifpn_s0,
    revbifpn_s1,
    revbifpn_s2,
    revbifpn_s3,
    revbifpn_s4,
    revbifpn_s5,
    revbifpn_s6,
    to_official,
    training_memory,
)
from .ops import resample_add, resample_add_, resample_adjoint, resample_undo
from .reversible import Reversible, ReversibleSequential
from .silo import RevSilo

__version__ = "0.1.0"

__all__ = [
    "SIZES",
    "Config",
    "DetectionBackbone",
    "MBConv",
    "Recomputed",
    "RevBiFPN",
    "RevBlock",
    "RevLevels",
    "RevSilo",
    "Reversible",
    "ReversibleSequential",
    "create_model",
    "load_official",
    "macs",
    "resample_add",
    "resample_add_",
    "resample_adjoint",
    "resample_undo",
    "revbifpn_s0",
    "revbifpn_s1",
    "revbifpn_s2",
    "revbifpn_s3",
    "revbifpn_s4",
    "revbifpn_s5",
    "revbifpn_s6",
    "to_official",
    "training_memory",
]
