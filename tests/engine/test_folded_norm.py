"""Blocks of MBConvs whose last norms are folded into the fusions: as if modules ran one by one."""

import copy

import pytest
import torch
from helpers import same_bits
from mbconvs import OPTIONS, make
from operators import Operators
from torch import nn

from revbifpn_kernels import MBConv, RevBlock, ReversibleSequential, RevSilo
from revbifpn_kernels.mbconv import transform
from revbifpn_kernels.ops.resample.folded_norm import ScaledSource

ALL = OPTIONS["all"]


def block(options=ALL, dtype=torch.float64) -> RevBlock:
    return RevBlock(*(make(options, dtype, channels=(8, 8)) for _ in range(2)))


def silo(options=ALL, dtype=torch.float64) -> RevSilo:
    """Its edges onto level 0 are an MBConv and a convolution."""
    return RevSilo(
        {
            (0, 1): make(options | {"stride": 2}, dtype, channels=(16, 8)),
            (0, 2): make(options | {"stride": 4}, dtype, channels=(16, 8)),
            (1, 2): make(options | {"stride": 2}, dtype, channels=(8, 8)),
            (1, 0): make(options, dtype, channels=(8, 16)),
            (2, 0): nn.Conv2d(8, 16, 1, dtype=dtype),
        }
    )


def streams(kind, dtype=torch.float64) -> list[torch.Tensor]:
    sides = (12,) if kind is block else (12, 6, 3)
    generator = torch.Generator().manual_seed(3)
    channels = (16, 8, 8)
    return [
        torch.randn(2, c, s, s, dtype=dtype, generator=generator).requires_grad_()
        for c, s in zip(channels, sides, strict=False)
    ]


def results(net, xs, reversible=True, autocast=False) -> dict[str, torch.Tensor]:
    net, xs = copy.deepcopy(net), [x.detach().clone().requires_grad_() for x in xs]
    net.reversible = reversible
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ys = net(*xs)
    sum((y.double() * (y.detach().double() + 1).cos()).sum() for y in ys).backward()
    found = {f"y {k}": y.detach() for k, y in enumerate(ys)}
    found |= {f"grad of x {k}": x.grad for k, x in enumerate(xs)}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | dict(net.named_buffers())


def as_modules(monkeypatch, net, xs, **options):
    with monkeypatch.context() as patch:
        patch.setattr(transform, "can_run", lambda x: False)
        return results(net, xs, **options)


def error(ours, exact) -> float:
    names = [name for name in exact if "num_batches" not in name]
    parts = [(ours[name].double() - exact[name].double()).flatten() for name in names]
    total = torch.cat([exact[name].double().flatten() for name in names])
    return (torch.cat(parts).norm() / total.norm()).item()


over_kinds = pytest.mark.parametrize("kind", [block, silo])
over_modes = pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])


@over_kinds
@over_modes
@pytest.mark.parametrize("options", [OPTIONS["plain"], ALL | {"drop_path": 0.0}])
@pytest.mark.parametrize("mode", ["batch statistics", "running statistics"])
def test_equals_its_modules(monkeypatch, kind, reversible, options, mode):
    net, xs = kind(options), streams(kind)
    if mode == "running statistics":
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
    ours = results(net, xs, reversible)
    assert error(ours, as_modules(monkeypatch, net, xs, reversible=False)) < 1e-7


@over_kinds
def test_stored_and_reversible_drop_the_same_samples(kind):
    net, xs = kind(), streams(kind)
    assert error(results(net, xs), results(net, xs, reversible=False)) < 1e-12


@over_kinds
def test_exact_mode_has_the_bits_of_stored_activations(kind):
    nets = [kind(dtype=torch.float32) for _ in range(3)]
    chain = ReversibleSequential(*nets, lattice=2.0**-12)
    xs = streams(kind, torch.float32)
    ours, stored = (results(chain, xs, reversible) for reversible in (True, False))
    assert all(same_bits(ours[name], stored[name]) for name in stored)


@over_kinds
def test_autocast_is_as_near_to_float64(monkeypatch, kind):
    net, xs = kind(ALL | {"drop_path": 0.0}, torch.float32), streams(kind, torch.float32)
    exact = as_modules(monkeypatch, copy.deepcopy(net).double(), [x.double() for x in xs])
    ours = results(net, xs, autocast=True)
    assert error(ours, exact) <= 2 * error(as_modules(monkeypatch, net, xs, autocast=True), exact)


def test_the_last_norm_is_not_written():
    net, xs = block(), streams(block)
    (y,) = net(*xs)
    with Operators() as operators:
        y.sum().backward()
    acts = [args[6] for name, args, _ in operators.calls if name == "norm_act"]
    assert acts == ["hardswish"] * 4  # of expand and depthwise, two transforms


@pytest.mark.parametrize("watch", ["hook", "wrapper"])
def test_hooks_and_wrappers_see_the_norm_s_result(monkeypatch, watch):
    net, xs = block(OPTIONS["plain"]), streams(block)
    expected = results(net, xs)
    seen = []
    if watch == "hook":
        net.f.register_forward_hook(lambda module, x, y: seen.append(type(y)))
    else:
        net.f = Wrapper(net.f, seen)
    ours = results(net, xs)
    assert set(seen) == {torch.Tensor}
    assert error(dict(zip(expected, ours.values(), strict=True)), expected) < 1e-12


class Wrapper(nn.Module):
    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, x):
        y = self.inner(x)
        self.seen.append(type(y))
        return y

    def __deepcopy__(self, memo):
        return Wrapper(copy.deepcopy(self.inner, memo), self.seen)


def test_alone_it_returns_maps():
    net = MBConv(8, 8)
    assert not isinstance(net(torch.randn(2, 8, 6, 6)), ScaledSource)


def test_a_hook_that_comes_after_the_forward_changes_nothing():
    net, xs = block(OPTIONS["plain"]), streams(block)
    expected = results(net, xs)
    ys = net(*xs)
    handle = net.f.register_forward_hook(lambda module, x, y: None)
    sum((y * (y.detach() + 1).cos()).sum() for y in ys).backward()
    handle.remove()
    assert all(torch.equal(p.grad, expected[name]) for name, p in net.named_parameters())


def test_stored_activations_differentiate_twice():
    net = block(OPTIONS["plain"] | {"act_layer": nn.SiLU})
    net.reversible = False
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(net, x, fast_mode=True)


class LayerScaled(MBConv):
    def forward(self, x):
        return super().forward(x) * 0.5


@over_modes
def test_subclasses_see_maps(monkeypatch, reversible):
    net = RevBlock(LayerScaled(8, 8), make(OPTIONS["plain"], torch.float32, (8, 8))).double()
    xs = streams(block)
    ours = results(net, xs, reversible)
    assert error(ours, as_modules(monkeypatch, net, xs, reversible=False)) < 1e-7


class TwiceOnce(nn.Module):
    """Calls one MBConv as the edge of a silo of its own, which takes scaled sources, and alone."""

    def __init__(self, is_silo_first):
        super().__init__()
        self.inner = RevSilo({(0, 1): MBConv(8, 8)})
        self.is_silo_first = is_silo_first

    def forward(self, x):
        module = self.inner.down["0_1"]
        alone = None if self.is_silo_first else module(x)
        fused = self.inner(x, x)[1]
        return fused + (module(x) if alone is None else alone)


@pytest.mark.parametrize("is_silo_first", [True, False])
def test_each_call_decides_whether_its_norm_is_folded(is_silo_first):
    net, xs = RevBlock(TwiceOnce(is_silo_first), nn.Identity()).double(), streams(block)
    assert error(results(net, xs), results(net, xs, reversible=False)) < 1e-12
