"""The streams of a chain: how they enter it, and keys to compare them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..ops import resample_add

Streams = tuple[Tensor, ...]


def enter(chain: nn.Module, xs: Streams, lattice: float | None) -> Streams:
    """Return a chain's checked inputs: float32 under autocast, on the lattice if there is one."""
    name = type(chain).__name__
    for k, x in enumerate(xs):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            hint = "; pass streams one by one, as in f(*streams)" if isinstance(x, Sequence) else ""
            raise TypeError(f"{name}: stream {k} must be a floating-point tensor, got {got}{hint}")
    if not xs:
        raise ValueError(f"{name}: expected at least one stream, got none")
    device = xs[0].device.type
    stays_half = device == "meta" or getattr(chain, "keeps_inputs", False)
    if not stays_half and torch.is_autocast_enabled(device):
        xs = tuple(x.float() if x.dtype.itemsize == 2 else x for x in xs)
    if lattice is None:
        return xs
    for k, x in enumerate(xs):
        if x.dtype.itemsize < 4:
            raise TypeError(
                f"{name}: stream {k} must be float32 or float64 with a lattice, got {x.dtype}"
            )
    return tuple(snap(x, lattice) for x in xs)


def finest_lattice(blocks: Iterable[nn.Module]) -> float | None:
    """Return the smallest lattice among the blocks', None if none has one."""
    lattices = [block.lattice for block in blocks if block.lattice is not None]
    return min(lattices) if lattices else None


def snap(x: Tensor, lattice: float) -> Tensor:
    """Round x, of any shape, to multiples of `lattice`; the gradient passes through."""
    maps = x if x.dim() == 4 else x.reshape(1, 1, 1, -1)
    return resample_add(torch.zeros_like(maps), [maps], lattice=lattice).view_as(x)


def identity(x: Tensor) -> tuple:
    """Return a key for a tensor's memory, layout and version: equal if nothing was written."""
    storage = x.untyped_storage()._cdata
    return storage, x.storage_offset(), x._version, x.dtype, x.shape, x.stride()
