"""What the kernels compute: one op a file, Triton on GPUs and C++ (csrc/) on CPUs."""

from .resample.add import resample_add, resample_add_
from .resample.adjoint import resample_adjoint
from .resample.undo import resample_undo

__all__ = ["resample_add", "resample_add_", "resample_adjoint", "resample_undo"]
