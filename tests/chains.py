"""Small reversible chains of every kind, and their twins under plain autograd."""

import copy

import pytest
import torch
from torch import Tensor, nn

from revbifpn_kernels import MBConv, RevBlock, Reversible, ReversibleSequential, RevLevels, RevSilo

WIDTHS = (6, 8, 10)
LATTICE = 2.0**-12


def transform(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Foreign layers: batch norm, dropout of elements and of samples' channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Hardswish(),
        nn.Dropout(0.2),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Dropout2d(0.2),
    )


def mbconv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return MBConv(inputs, outputs, 3, stride, expand_ratio=2.0, se_ratio=0.25, drop_path=0.3)


def plain(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """No randomness, no statistics."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GELU(), nn.Conv2d(outputs, outputs, 1)
    )


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, stride)


class Coupling(Reversible):
    """A user's block: forward and inverse alone."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        b = b + self.f(a)
        return a + self.g(b), b

    def inverse(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a - self.g(b)
        return a, b - self.f(a)


def silo(make=transform, levels: int = 3, **options) -> RevSilo:
    edges = {
        (i, j): make(WIDTHS[i], WIDTHS[j], 2 ** max(j - i, 0))
        for i in range(levels)
        for j in range(levels)
        if i != j
    }
    return RevSilo(edges, **options)


def silos(depth: int, make=transform) -> ReversibleSequential:
    return ReversibleSequential(*(silo(make) for _ in range(depth)))


def growing(depth: int, make=transform) -> ReversibleSequential:
    """From one level to three, then `depth` silos between them."""
    grow = [silo(make, 2, inputs=1), silo(make, 3, inputs=2)]
    return ReversibleSequential(*grow, *(silo(make) for _ in range(depth)))


def blocks(depth: int, make=transform) -> ReversibleSequential:
    """Residual couplings of 7 channels: halves of 4 and 3."""
    return ReversibleSequential(*(RevBlock(make(4, 3), make(3, 4)) for _ in range(depth)))


def levels(depth: int, make=transform) -> ReversibleSequential:
    """A residual block on each of three levels, then a silo, as in RevBiFPN."""
    parts = []
    for _ in range(depth):
        halves = (make(w // 2, w // 2) for w in WIDTHS for _ in range(2))
        parts += [RevLevels(*(RevBlock(f, next(halves)) for f in halves)), silo(make)]
    return ReversibleSequential(*parts)


def couplings(depth: int, make=transform) -> ReversibleSequential:
    return ReversibleSequential(*(Coupling(make(6, 6), make(6, 6)) for _ in range(depth)))


KINDS = (silos, growing, blocks, levels, couplings)
MAKES = (plain, transform, mbconv)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def streams(kind, *, batch: int = 2, side: int = 8, dtype=torch.float32) -> list[Tensor]:
    """Inputs for a chain made by `kind`."""
    shapes = {
        silos: [(w, side >> level) for level, w in enumerate(WIDTHS)],
        growing: [(WIDTHS[0], side)],
        levels: [(w, side >> level) for level, w in enumerate(WIDTHS)],
        blocks: [(7, side)],
        couplings: [(6, side), (6, side)],
    }
    return [torch.randn(batch, c, s, s, dtype=dtype) for c, s in shapes[kind]]


def stored(chain: nn.Module) -> nn.Module:
    """A copy that trains under plain autograd."""
    twin = copy.deepcopy(chain)
    for module in twin.modules():
        if hasattr(module, "reversible"):
            module.reversible = False
    return twin


def exact_pair(kind, depth=2, make=transform):
    """A chain in exact mode and its twin under plain autograd, which must agree to the bit."""
    chain = kind(depth, make)
    chain.lattice = LATTICE
    return chain, stored(chain)


def pair_of(make, *, lattice=LATTICE):
    """A chain of residual blocks with the transforms that `make()` returns, and its twin."""
    chain = ReversibleSequential(*(RevBlock(make(), make()) for _ in range(2)), lattice=lattice)
    return chain, stored(chain)
