"""MBConv, the transform F and G of RevBiFPN: its modules, and in training one fused Function."""

from .drop_path import DropPath
from .modules import BatchNorm2d, ConvNorm, SqueezeExcite
from .transform import MBConv

__all__ = ["BatchNorm2d", "ConvNorm", "DropPath", "MBConv", "SqueezeExcite"]
