"""RevBiFPN S0–S6: sizes, the network, the published checkpoints, adapters."""

from .checkpoints import load_official
from .cost import macs, training_memory
from .create import (
    create_model,
    revbifpn_s0,
    revbifpn_s1,
    revbifpn_s2,
    revbifpn_s3,
    revbifpn_s4,
    revbifpn_s5,
    revbifpn_s6,
)
from .detection import DetectionBackbone
from .official import to_official
from .revbifpn import RevBiFPN
from .sizes import SIZES, Config
from .timm_registration import register_with_timm

__all__ = [
    "SIZES",
    "Config",
    "DetectionBackbone",
    "RevBiFPN",
    "create_model",
    "load_official",
    "macs",
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

register_with_timm()
