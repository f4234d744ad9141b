"""What the second run of a transform must repeat of its first: all of it is here.

A reversible block runs its transforms twice: in the forward without a graph, and in the backward,
on restored inputs, with one. The second run must use the random numbers (`draws`) and the batch
statistics (`norms`, `sync`) of the first, under the same autocast (`runs`) and with what the
modules held then (`held`), and must not move running statistics again (`observe`). Nothing is kept
on modules, and no generator is asked for its state unless a transform draws.
"""

from .modes import call, recorder
from .sharing import shared, sharing
from .step import Step
from .trace import Replay, Tracked, is_replaying, may_leave_norm, run

__all__ = [
    "Replay",
    "Step",
    "Tracked",
    "call",
    "is_replaying",
    "may_leave_norm",
    "recorder",
    "run",
    "shared",
    "sharing",
]
