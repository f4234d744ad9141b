"""What a block returns, and with `check` whether it can be taken back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .trace import Replay


def tuple_of_streams(
    block: nn.Module, streams, method: str, count: int | None = None
) -> tuple[Tensor, ...]:
    """What `method` of a block returned; raise unless it is a tuple of (`count`) tensors."""
    is_tuple = isinstance(streams, (tuple, list)) and all(isinstance(s, Tensor) for s in streams)
    if not is_tuple or (count is not None and len(streams) != count):
        wanted = "a tuple of tensors" if count is None else f"a tuple of {count} tensors"
        got = f"{len(streams)} tensors" if is_tuple else type(streams).__name__
        raise TypeError(f"{type(block).__name__}: {method} must return {wanted}, got {got}")
    return tuple(streams)


def check_inverse(
    block: nn.Module, replay: Replay, xs: Sequence[Tensor], ys: Sequence[Tensor]
) -> None:
    """Raise unless `inverse` takes `forward` back, to rounding."""
    with replay.second(is_reversed=True):
        restored = tuple_of_streams(block, block.inverse(*ys), "inverse")
    replay.positions = None
    for k, (x, back) in enumerate(zip(xs, restored, strict=False)):
        is_exact = block.lattice is not None
        allowed = torch.finfo(x.dtype).eps ** 0.5 * max(y.abs().max() for y in ys if y.numel())
        error = (x - back).abs().max().item() if x.numel() else 0.0
        if error > (0.0 if is_exact else allowed):
            hint = "; with a lattice, bit for bit: add by resample_add(…, lattice=self.lattice)"
            raise RuntimeError(
                f"{type(block).__name__}: inverse returns input {k} with an error of "
                f"{error:.3g}; expected it to take forward back (transforms called in the opposite "
                f"order, with the same inputs){hint if is_exact else ''}"
            )


def check_range(block: nn.Module, ys: Sequence[Tensor]) -> None:
    """Raise if a stream is where its lattice, of 2²⁴ steps to either side, no longer is exact."""
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
