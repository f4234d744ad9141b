"""Blocks that users write: what they may do, and what `check` says of their faults."""

import pytest
import torch
from chains import LATTICE, Coupling, blocks, plain, silos, stored, streams, transform
from steps import gradients_of, loss_of, relative_error
from torch import nn

from revbifpn_kernels import RevBlock, Reversible, ReversibleSequential, RevLevels, resample_add

X = torch.randn(2, 8, 6, 6)


class OfOne(Coupling):
    """A user's block of one stream."""

    def forward(self, x):
        return (torch.cat(super().forward(*x.chunk(2, 1)), 1),)

    def inverse(self, y):
        return (torch.cat(super().inverse(*y.chunk(2, 1)), 1),)


def test_users_blocks_and_levels_in_levels():
    def inner():
        return OfOne(transform(4, 4), transform(4, 4))

    net = ReversibleSequential(
        RevLevels(inner(), inner()),
        RevLevels(RevLevels(RevBlock(transform(4, 4), transform(4, 4))), inner()),
    ).double()
    xs = [X.double(), X.double() + 1]
    expected = gradients_of(stored(net), xs)
    assert relative_error(gradients_of(net, xs), expected) < 1e-9
    block = inner()
    with pytest.raises(ValueError, match="RevLevels: expected a block of its own for each level"):
        RevLevels(block, block)
    with pytest.raises(ValueError, match="RevLevels: expected 2 streams, got 1"):
        net(X.double())


def test_blocks_that_return_no_tuple():
    class Bare(Coupling):
        def forward(self, a, b):
            return a

    with pytest.raises(TypeError, match="Bare: forward must return a tuple of tensors, got Tensor"):
        Bare(plain(8, 8), plain(8, 8))(X, X)


def test_forward_from_a_mixin():
    class Mixin:
        def forward(self, a, b):
            return a + self.g(b), b

        def inverse(self, a, b):
            return a - self.g(b), b

    class Mixed(Mixin, Reversible):
        def __init__(self):
            super().__init__()
            self.g = nn.Conv2d(8, 8, 1)

    net = Mixed()
    expected = gradients_of(stored(net), [X, X])
    assert relative_error(gradients_of(net, [X, X]), expected) < 1e-5


def test_check_finds_a_wrong_inverse():
    class InForwardOrder(Coupling):
        def inverse(self, a, b):
            b = b - self.f(a)
            return a - self.g(b), b

    net = InForwardOrder(plain(8, 8), plain(8, 8))
    net.check = True
    with pytest.raises(RuntimeError, match="InForwardOrder: inverse returns input 0 with an error"):
        net(X, X)
    with torch.no_grad():
        net(X, X)

    class Bare(Coupling):
        def inverse(self, a, b):
            return a - self.g(b)

    with pytest.raises(TypeError, match="Bare: inverse must return a tuple of 2 tensors, got Ten"):
        loss_of(Bare(plain(8, 8), plain(8, 8))(X, X)).backward()
    good = Coupling(transform(8, 8), transform(8, 8))
    good.check = True
    expected = gradients_of(stored(good), [X, X])
    assert relative_error(gradients_of(good, [X, X]), expected) < 1e-5
    nan = [X * float("nan"), X]
    good(*nan)  # NaN is no fault of the transform's


class Exact(Coupling):
    """A user's block that keeps streams on the lattice."""

    def forward(self, a, b):
        b = resample_add(b, [self.f(a)], lattice=self.lattice)
        return resample_add(a, [self.g(b)], lattice=self.lattice), b

    def inverse(self, a, b):
        a = resample_add(a, [self.g(b)], alpha=-1, lattice=self.lattice)
        return a, resample_add(b, [self.f(a)], alpha=-1, lattice=self.lattice)


def test_exact_mode_of_users_blocks():
    net = ReversibleSequential(
        *(Exact(plain(8, 8), plain(8, 8)) for _ in range(4)), lattice=LATTICE, check=True
    )
    expected = gradients_of(stored(net), [X, X])
    assert relative_error(gradients_of(net, [X, X]), expected) == 0
    net = ReversibleSequential(*(Coupling(plain(8, 8), plain(8, 8)) for _ in range(4)))
    net.lattice, net.check = LATTICE, True
    with pytest.raises(RuntimeError, match="with a lattice, bit for bit: add by resample_add"):
        net(X, X)


def test_forward_that_writes_to_its_input():
    class InPlace(Coupling):
        def forward(self, a, b):
            b += self.f(a)
            return a + self.g(b), b

    with pytest.raises(RuntimeError, match="InPlace: forward changed an input in place"):
        InPlace(plain(8, 8), plain(8, 8))(X.clone(), X.clone())


class Cut(nn.Module):
    """A transform that lets no gradient through."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.inner = plain(inputs, outputs, stride)

    def forward(self, x):
        return self.inner(x.detach())


@pytest.mark.parametrize("kind", [silos, blocks])
def test_transforms_that_cut_the_graph(kind):
    net = kind(2, Cut)
    net.lattice = LATTICE
    xs = streams(kind)
    expected = gradients_of(stored(net), xs)
    assert relative_error(gradients_of(net, xs), expected) == 0
