"""The engine: chains of invertible blocks whose backward needs no stored activations.

Each block of a forward call is one autograd Function (`function`). The blocks share a tape: the
last one saves its outputs; in the backward every block takes its outputs from the tape, restores
its inputs, differentiates one transform at a time and puts the inputs on the tape for the block
before. What is saved does not grow with depth.
"""

from .block import Reversible
from .sequential import ReversibleSequential
from .step import Pullback, Step

__all__ = ["Pullback", "Reversible", "ReversibleSequential", "Step"]
