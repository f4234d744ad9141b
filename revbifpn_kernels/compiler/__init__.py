"""torch.compile of whole training steps whose memory stays reversible; not public yet.

Open: shapes are static; exact mode and blocks with an inverse of their own run uncompiled; torch
2.11 is refused.
"""

from .entry import compile

__all__ = ["compile"]
