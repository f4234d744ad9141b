"""What the ops of the family share: activations, dtypes, schema and checks of their arguments.

x, grad (N, C, H, W); mean, invstd, weight, bias (C,); gate, grad_means (N, C).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_float64_is_on_cpu, check_maps, check_values

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
NORM = "Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias"


def sums_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics, gates and sums for maps x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_act(op: str, act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {tuple(ACTIVATIONS)}, got {act!r}")


def check_norm(op: str, x: Tensor, mean, invstd, weight, bias, act: str, **gates) -> None:
    """Raise unless a norm of x and an activation can be computed; `gates` are (N, C) or None."""
    check_maps(op, "x", x)
    check_float64_is_on_cpu(op, x)
    channels = (x.shape[1],), sums_dtype(x), x.device
    for name, values in (("mean", mean), ("invstd", invstd), ("weight", weight), ("bias", bias)):
        if values is not None:
            check_values(op, name, values, channels)
    check_act(op, act)
    for name, values in gates.items():
        if values is not None:
            check_values(op, name, values, (tuple(x.shape[:2]), sums_dtype(x), x.device))
