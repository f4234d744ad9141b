"""What the recompute of a transform must repeat of its forward.

A reversible block runs its transforms twice: in the forward without a graph, and in the backward,
on restored inputs, with one. The recompute must use the forward's random numbers (`rng`) and batch
statistics (`batch_norm`) under the same autocast (`trace`) and with the same modes, parameters and
buffers (`module_state`), and must not update running statistics again (`modes`). No generator is
asked for its state unless a transform draws. Nothing of a call is saved on modules: they only
remember what they are made of (`snapshot`).
"""

from .batch_norm import group_of
from .modes import call, current_recorder, decide
from .rng import shared_draws, sharing_draws
from .trace import BlockTrace, TrackedModule, is_traced, run_transform

__all__ = [
    "BlockTrace",
    "TrackedModule",
    "call",
    "current_recorder",
    "decide",
    "group_of",
    "is_traced",
    "run_transform",
    "shared_draws",
    "sharing_draws",
]
