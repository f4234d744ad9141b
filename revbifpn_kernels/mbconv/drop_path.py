"""Stochastic depth: drops whole samples of a transform's result in training."""

from torch import Tensor, nn

from ..reversible import recompute
from ..reversible.recompute.snapshot import parts_of


class DropPath(nn.Module):
    """Stochastic depth: in training drops whole samples, and scales up the others."""

    records_itself = True

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"DropPath: probability must lie in [0, 1), got {probability}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = recompute.call(Tensor.bernoulli_, x.new_empty(x.shape[0], 1, 1, 1), keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"{self.probability}"


def drop_factors(probability: float, samples: int, like: Tensor) -> Tensor:
    """Return each sample's factor in stochastic depth, (samples,): 0 or 1 / (1 − p), as `like`.

    In a block's call they are drawn at once for all its transforms of that probability.
    """
    block, drawn = recompute.shared_draws() or (None, {})
    rows = drawn.setdefault((DropPath, probability, samples, like.dtype, like.device), [])
    if not rows:
        parts = () if block is None else parts_of(block)
        drops = (part for part in parts if type(part) is DropPath and part.training)
        count = max(1, sum(drop.probability == probability for drop in drops))
        keep = 1.0 - probability
        rows += like.new_empty(count, samples).bernoulli_(keep).div_(keep).unbind()
    return rows.pop()
