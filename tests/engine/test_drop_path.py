"""Stochastic depth: all masks of a block are drawn at once, and each sample is dropped alone."""

import pytest
import torch
from mbconvs import make
from operators import Operators

from revbifpn_kernels import RevBlock
from revbifpn_kernels.mbconv.drop_path import DropPath, drop_factors
from revbifpn_kernels.reversible.recompute import sharing_draws


def drawn_shapes(operators: Operators) -> list:
    return [shape for name, _, shape in operators.calls if "bernoulli" in name]


@pytest.mark.parametrize("reversible", [True, False])
def test_a_block_draws_once(reversible):
    net = RevBlock(*(make({"drop_path": 0.3}, channels=(8, 8)) for _ in range(2)))
    net.reversible = reversible
    x = torch.randn(5, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    with Operators() as operators:
        net(x)[0].sum().backward()
    assert drawn_shapes(operators) == [(2, 5)]


def test_each_probability_is_drawn_for_itself():
    net = RevBlock(
        make({"drop_path": 0.3}, channels=(8, 8)), make({"drop_path": 0.1}, channels=(8, 8))
    )
    with Operators() as operators:
        net(torch.randn(5, 16, 6, 6, dtype=torch.float64, requires_grad=True))
    assert drawn_shapes(operators) == [(1, 5), (1, 5)]


def test_a_transform_that_runs_more_often_draws_again():
    like = torch.zeros(1)
    block = torch.nn.Sequential(DropPath(0.5), DropPath(0.5))
    with sharing_draws(block), Operators() as operators:
        rows = [drop_factors(0.5, 64, like) for _ in range(5)]
    assert drawn_shapes(operators) == [(2, 64)] * 3
    assert all(not torch.equal(a, b) for k, a in enumerate(rows) for b in rows[:k])


def test_means_are_preserved():
    factors = drop_factors(0.2, 20_000, torch.zeros(1, dtype=torch.float64))
    assert set(factors.tolist()) == {0.0, 1.25}
    assert abs(factors.mean() - 1) < 0.02


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_impossible_probabilities(probability):
    with pytest.raises(ValueError, match="DropPath: probability must lie in"):
        DropPath(probability)
