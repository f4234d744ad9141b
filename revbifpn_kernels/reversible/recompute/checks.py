"""What a block or a transform must not do, and the errors that say so."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class NotRepeatable(RuntimeError):
    """A transform does something that its recompute did not, or could not, repeat."""


def tuple_of_streams(
    block: nn.Module, streams, method: str, count: int | None = None
) -> tuple[Tensor, ...]:
    """Return what `method` of a block returned; raise unless it is `count` tensors."""
    is_tuple = isinstance(streams, (tuple, list)) and all(isinstance(s, Tensor) for s in streams)
    if not is_tuple or (count is not None and len(streams) != count):
        wanted = "a tuple of tensors" if count is None else f"a tuple of {count} tensors"
        got = f"{len(streams)} tensors" if is_tuple else type(streams).__name__
        raise TypeError(f"{type(block).__name__}: {method} must return {wanted}, got {got}")
    return tuple(streams)


def check_equal(forward, recomputed) -> None:
    """Raise unless a transform's recompute returned the forward's bits, NaNs included."""
    for y, again in zip(tree_leaves(forward), tree_leaves(recomputed), strict=True):
        if isinstance(y, Tensor) and not ((y == again) | (y.isnan() & again.isnan())).all():
            difference = (y - again).abs().max().item()
            raise NotRepeatable(
                f"is not deterministic: two runs on one input differ by {difference:.3g}; expected "
                "the same bits (numbers from PyTorch's generators are repeated, others are not)"
            )


def check_inverse(
    block: nn.Module, xs: Sequence[Tensor], ys: Sequence[Tensor], restored: Sequence[Tensor]
) -> None:
    """Raise unless `restored`, which `inverse` made of `ys`, are the inputs, to rounding."""
    for k, (x, back) in enumerate(zip(xs, restored, strict=False)):
        is_exact = block.lattice is not None
        allowed = torch.finfo(x.dtype).eps ** 0.5 * max(y.abs().max() for y in ys if y.numel())
        error = (x - back).abs().max().item() if x.numel() else 0.0
        if error > (0.0 if is_exact else allowed):
            hint = "; with a lattice, bit for bit: add by resample_add(…, lattice=self.lattice)"
            raise RuntimeError(
                f"{type(block).__name__}: inverse returns input {k} with an error of "
                f"{error:.3g}; expected the input itself (transforms called in the opposite "
                f"order, with the same inputs){hint if is_exact else ''}"
            )


def check_range(block: nn.Module, ys: Sequence[Tensor]) -> None:
    """Raise if a stream exceeds the 2²⁴ steps of its lattice that float32 adds exactly."""
    if block.lattice is None:
        return
    for k, y in enumerate(ys):
        limit = block.lattice * 2.0 ** (53 if y.dtype == torch.float64 else 24)
        largest = y.abs().max().item() if y.numel() else 0.0
        if not largest < limit:
            raise RuntimeError(
                f"{type(block).__name__}: output {k} reaches {largest:.6g}, beyond the range "
                f"{limit:g} of lattice {block.lattice:g}, so it is restored to rounding only; "
                "choose a coarser lattice"
            )
