"""MBConv, the transform F and G of RevBiFPN: its modules, and in training one fused Function."""

from .transform import MBConv

__all__ = ["MBConv"]
