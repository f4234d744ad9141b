"""The engine: gradients, statistics and random numbers as under plain autograd."""

import pytest
import torch
from chains import (
    KINDS,
    LATTICE,
    MAKES,
    blocks,
    couplings,
    growing,
    levels,
    over_kinds,
    plain,
    silos,
    stored,
    streams,
)
from steps import assert_same_bits, gradients_of, loss_of, relative_error

over_makes = pytest.mark.parametrize("make", MAKES)


@over_kinds
@over_makes
def test_gradients_equal_plain_autograd(kind, make):
    depth = (1, 2, 3, 12)[(KINDS.index(kind) + MAKES.index(make)) % 4]
    chain = kind(depth, make).double()
    xs = streams(kind, dtype=torch.float64)
    expected = gradients_of(stored(chain), xs)
    # Restoring loses a few bits a block; squeezing a wrong mask or statistic in costs far more.
    assert relative_error(gradients_of(chain, xs), expected) < 1e-9


@pytest.mark.parametrize("kind", [silos, growing, blocks, levels])
@over_makes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_exact_mode_has_the_bits_of_plain_autograd(kind, make, layout):
    chain = kind(2 + MAKES.index(make), make)
    chain.lattice = LATTICE
    xs = streams(kind, side=16)
    if layout == "channels_last":
        chain.to(memory_format=torch.channels_last)
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]
    expected = gradients_of(stored(chain), xs)
    assert_same_bits(gradients_of(chain, xs), expected)


@over_kinds
def test_inverse_takes_forward_back(kind):
    chain = kind(4, plain)
    xs = streams(kind, dtype=torch.float64)
    chain.double()
    with torch.no_grad():
        back = chain.inverse(*chain(*xs))
    assert len(back) == len(xs)
    for x, restored in zip(xs, back, strict=True):
        torch.testing.assert_close(restored, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [silos, growing, blocks, levels])
def test_exact_mode_restores_every_bit(kind):
    chain = kind(6, plain).eval()
    chain.lattice = LATTICE
    xs = [(x / LATTICE).round() * LATTICE + 0.0 for x in streams(kind)]
    with torch.no_grad():
        for x, restored in zip(xs, chain.inverse(*chain(*xs)), strict=True):
            assert torch.equal(restored, x)


def test_a_thousand_couplings_are_restored_exactly():
    block = blocks(1, plain)[0].eval()
    block.lattice = LATTICE
    for p in block.parameters():  # so that what 1,000 couplings add stays in range
        p.data *= 0.1
    x = (torch.randn(1, 7, 4, 4) / LATTICE).round() * LATTICE + 0.0
    with torch.no_grad():
        y = x
        for _ in range(500):  # two couplings each
            (y,) = block(y)
        assert not torch.equal(y, x) and y.abs().max() < LATTICE * 2**24
        for _ in range(500):
            (y,) = block.inverse(y)
    assert torch.equal(y, x)


@over_kinds
def test_running_statistics_after_steps(kind):
    chain = kind(2)
    chain.lattice = LATTICE if kind is not couplings else None
    twin = stored(chain)
    for step in range(4):
        xs = streams(kind)
        for net in (chain, twin):
            torch.manual_seed(step)
            loss_of(net(*xs)).backward()
    for (name, ours), theirs in zip(chain.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert next(b for n, b in chain.named_buffers() if "num_batches" in n) == 4


def test_switch_and_constructor_choose_plain_autograd():
    chain = silos(2, plain)
    assert not type(chain)(*chain, reversible=False).reversible
    for is_reversible in (True, False, True):
        chain.reversible = is_reversible
        y = chain(*[x.requires_grad_() for x in streams(silos)])[0]
        assert (type(y.grad_fn).__name__ == "_BlockBackward") == is_reversible


@over_kinds
def test_a_block_alone_is_reversible(kind):
    block = kind(1)[-1]
    xs = streams(silos if kind is growing else kind)
    y = block(*[x.requires_grad_() for x in xs])[0]
    assert type(y.grad_fn).__name__ == "_BlockBackward"
    block.double()
    xs = [x.double() for x in xs]
    expected = gradients_of(stored(block), xs)
    assert relative_error(gradients_of(block, xs), expected) < 1e-12


def test_a_plain_image_trains_all_parameters():
    chain = growing(2)
    loss_of(chain(*streams(growing))).backward()
    assert all(p.grad is not None for p in chain.parameters())


def test_containers_run_what_they_hold():
    chain = silos(2, plain)
    xs = streams(silos)
    first, second = chain
    chain[0] = second
    chain.append(first)
    del chain[1]
    assert list(chain) == [second, first] and len(chain[:1]) == 1
    with torch.no_grad():
        expected = first(*second(*xs))
        assert all(torch.equal(a, b) for a, b in zip(chain(*xs), expected, strict=True))


def test_a_subclass_may_call_super():
    class Scaled(type(blocks(1)[0])):
        def forward(self, x):
            (y,) = super().forward(x)
            return (2 * y,)

        def inverse(self, y):
            return super().inverse(y / 2)

        def backward_step(self, ys, grads, step):
            return super().backward_step([ys[0] / 2], [2 * grads[0]], step)

    block = Scaled(plain(4, 3), plain(3, 4)).double()
    xs = streams(blocks, dtype=torch.float64)
    assert relative_error(gradients_of(block, xs), gradients_of(stored(block), xs)) < 1e-12
