"""torch.compile of whole training steps whose memory stays reversible; not public yet.

Gradients and held memory of RevBiFPN-S0 are right. Open: shapes are static; a `Recomputed` block
with dropout gave other gradients than the same block compiled to store; flags that change between
calls, autocast, DDP and torch 2.11 and 2.14 are untested.
"""

from .entry import compile

__all__ = ["compile"]
