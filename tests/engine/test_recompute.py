"""What the recompute repeats: random numbers, however they are drawn, and compiled transforms."""

import numpy
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from chains import (
    LATTICE,
    Coupling,
    blocks,
    exact_pair,
    mbconv,
    pair_of,
    plain,
    silos,
    stored,
    streams,
    transform,
)
from steps import assert_same_bits, gradients_of, loss_of, relative_error
from torch import nn

from revbifpn_kernels import RevBlock, ReversibleSequential
from revbifpn_kernels.reversible.recompute import rng


class Function(nn.Module):
    """A transform that is a function of its input, after a convolution."""

    def __init__(self, function):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.convolution(x))


GENERATOR = torch.Generator()
DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x * 1, 0.3, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3),
    "dropout2d": lambda x: F.dropout2d(x, 0.3),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.3),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=1),
    "bernoulli_ per sample": lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5),
    "bernoulli_ per element": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "large bernoulli_": lambda x: x * torch.empty(200, 200).bernoulli_(0.5).mean(),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "rand": lambda x: x * torch.rand(x.shape[0], 1, 1, 1),
    "large rand": lambda x: x * torch.rand(200, 200).mean(),
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint": lambda x: x * torch.randint(1, 4, (4, 1, 1)),
    "randperm": lambda x: x[:, torch.randperm(4)],
    "normal": lambda x: x + torch.normal(0.0, 1.0, (4, 1, 1)),
    "own generator": lambda x: x * torch.rand(4, 1, 1, generator=GENERATOR),
    "several": lambda x: F.dropout(x * torch.rand(4, 1, 1) + F.dropout(x, 0.5), 0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "fractional pool": lambda x: F.interpolate(F.fractional_max_pool2d(x, 2, 3), size=6),
}


@pytest.mark.parametrize("function", DRAWS.values(), ids=DRAWS.keys())
def test_random_numbers_are_repeated(function):
    def draw(x):
        return function(x)

    results = []
    for net in pair_of(lambda: Function(draw)):
        torch.manual_seed(0)
        GENERATOR.manual_seed(0)
        loss_of(net(torch.randn(2, 8, 6, 6))).backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
        results[-1]["generator"] = torch.get_rng_state()
    assert_same_bits(*results)


def test_every_drawing_operator_is_known():
    """PyTorch tags them; functions in Python around them are listed by hand."""
    tag = torch.Tag.nondeterministic_seeded
    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}
    tagged = {
        name
        for name in (schema.removeprefix("aten::") for schema in schemas)
        if any(
            tag in getattr(packet, overload).tags
            for packet in [getattr(torch.ops.aten, name)]
            for overload in packet.overloads()
        )
    }
    assert len(tagged) > 50
    for name in tagged:
        for place in (torch, torch.Tensor, F, torch._C._nn, torch._C._VariableFunctions):
            function = getattr(place, name, None)
            assert not callable(function) or rng.is_draw(function), f"{place}.{name}"
    words = ("drop", "rrelu", "gumbel", "fractional", "attention_forward")
    overridable = torch.overrides.get_testing_overrides()
    listed = [f for f in overridable if getattr(f, "__module__", None) == F.__name__]
    for function in listed:
        if any(word in function.__name__ for word in words):
            assert rng.is_draw(function), function
    assert not rng.is_draw(F.batch_norm) and not rng.is_draw(torch.conv2d)


def test_no_generator_is_asked_unless_a_transform_draws(monkeypatch):
    calls = []
    real = rng.saved_generator
    monkeypatch.setattr(rng, "saved_generator", lambda g: calls.append(1) or real(g))
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, name, lambda *args: calls.append(1))
    for make in (plain, mbconv):  # MBConv's masks are saved themselves
        loss_of(silos(2, make)(*streams(silos))).backward()
    assert calls == []
    loss_of(silos(1, transform)(*streams(silos))).backward()
    assert len(calls) == 12, "one per dropout, two in each of six transforms"


@pytest.mark.parametrize("make", [transform, mbconv])
@torch._dynamo.config.patch(recompile_limit=64)  # beyond it modules run as if not compiled
def test_compiled_transforms(make):
    chain, twin = exact_pair(blocks, 1, make)
    for block in (chain[0], twin[0]):  # what is compiled need not have the bits of what is not
        block.f = torch.compile(block.f, backend="eager")
    xs = streams(blocks)
    assert_same_bits(gradients_of(chain, xs), gradients_of(twin, xs))


def test_user_blocks_repeat_by_submodule():
    """Their inverse calls the transforms in another order than their forward."""

    class Lists(Coupling):
        def __init__(self):
            super().__init__(nn.Identity(), nn.Identity())
            self.parts = nn.ModuleList([transform(6, 6), transform(6, 6)])

        def forward(self, a, b):
            for part in self.parts:
                b = b + part(a)
            return a + self.parts[0](b), b

        def inverse(self, a, b):
            a = a - self.parts[0](b)
            for part in self.parts:
                b = b - part(a)
            return a, b

    chain = ReversibleSequential(Lists(), Lists()).double()
    xs = [torch.randn(2, 6, 8, 8, dtype=torch.float64) for _ in range(2)]
    expected = gradients_of(stored(chain), xs)
    assert relative_error(gradients_of(chain, xs), expected) < 1e-9


def test_reversible_chains_inside_transforms():
    chain = ReversibleSequential(
        RevBlock(nn.Sequential(Inner(), nn.Dropout(0.3)), Inner()), lattice=LATTICE
    )
    twin = stored(chain)
    xs = [torch.randn(2, 14, 6, 6)]
    expected = gradients_of(twin, xs)
    assert_same_bits(gradients_of(chain, xs), expected)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.chain = blocks(2, transform)

    def forward(self, x):
        return self.chain(x)[0]


def test_check_finds_numbers_that_are_not_pytorchs():
    def noisy(x):
        return x + float(numpy.random.rand())

    chain, _ = pair_of(lambda: Function(noisy))
    loss_of(chain(torch.randn(2, 8, 6, 6)))  # not noticed
    chain.check = True
    with pytest.raises(RuntimeError, match="RevBlock: f is not deterministic: two runs"):
        chain(torch.randn(2, 8, 6, 6))
    chain = silos(2, mbconv)
    chain.check, chain.lattice = True, LATTICE
    loss_of(chain(*streams(silos))).backward()
    with pytest.raises(RuntimeError, match=r"output 0 reaches .* beyond the range 4096"):
        chain(*[1e4 * x for x in streams(silos)])
