"""What the kernels compute: a family of ops per folder, Triton on GPUs and C++ (csrc/) on CPUs.

Importing this package registers every op of `torch.ops.revbifpn`.
"""

from . import conv, norm_act, squeeze_excite  # noqa: F401  (registers their ops)
from .resample.add import resample_add, resample_add_
from .resample.adjoint import resample_adjoint
from .resample.undo import resample_undo

__all__ = ["resample_add", "resample_add_", "resample_adjoint", "resample_undo"]
