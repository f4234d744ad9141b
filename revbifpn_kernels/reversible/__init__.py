"""The engine: chains of invertible blocks whose backward needs no stored activations."""

from .chain import Reversible, ReversibleSequential

__all__ = ["Reversible", "ReversibleSequential"]
