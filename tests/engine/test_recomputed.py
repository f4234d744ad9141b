"""Recomputed blocks in a chain: one may run the one before again instead of saving its inputs."""

import copy

import pytest
import torch
from helpers import same_bits
from tiny import tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.lib.memory import held_and_peak
from revbifpn_kernels import Recomputed, ReversibleSequential

SMALL_BYTES = 3 * 6000  # generators' states and statistics


class Widening(Recomputed):
    """Results are twice as large as inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        return (self.drop(self.norm(self.conv(x)).relu()),)


class Following(Widening):
    reruns_before = True


def chain(*kinds) -> ReversibleSequential:
    torch.manual_seed(0)
    return ReversibleSequential(*(kind(2 * 2**k) for k, kind in enumerate(kinds)))


def image() -> torch.Tensor:
    return torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(1))


def results(net, x, backwards: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = net(x)
    y = y if isinstance(y, torch.Tensor) else y[0]
    for _ in range(backwards):
        y.sin().sum().backward(retain_graph=backwards > 1)
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | dict(net.named_buffers())


def assert_same_bits(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    assert all(same_bits(ours[name], expected[name]) for name in ours)


def test_equals_stored_activations():
    net = chain(Widening, Following, Following)
    stored = copy.deepcopy(net)
    stored.reversible = False
    assert_same_bits(results(net, image()), results(stored, image()))


def test_a_second_backward_gives_the_same_again():
    net, twin = chain(Widening, Following), chain(Widening, Following)
    once, twice = results(net, image()), results(twin, image(), backwards=2)
    for name, p in net.named_parameters():
        assert torch.equal(twice[name], 2 * p.grad)
    assert torch.equal(twice["x.grad"], 2 * once["x.grad"])


def test_only_the_inputs_of_the_first_are_held():
    x = image().requires_grad_()

    def held(net) -> int:
        def forward():
            return net(x)[0].square().sum()

        forward()
        return held_and_peak(forward)[0] - 8 * x.nbytes  # of the square

    assert held(chain(Widening, Following, Following)) <= SMALL_BYTES
    assert held(chain(Widening, Widening, Following)) >= 2 * x.nbytes


def test_saves_inputs_where_nothing_else_can_compute_them():
    """After a block without a graph, or one that restores its inputs from its outputs."""
    net = chain(Widening, Following)
    net[0].requires_grad_(False)
    stored = copy.deepcopy(net)
    stored.reversible = False
    assert_same_bits(*(gradients_of_last(net) for net in (net, stored)))


def gradients_of_last(net) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    net(image())[0].sin().sum().backward()
    return {name: p.grad for name, p in net[-1].named_parameters()}


def test_functional_call_reaches_the_block_that_is_run_again():
    net, grads = chain(Widening, Following), []
    for reversible in (True, False):
        net.reversible = reversible
        torch.manual_seed(2)
        other = {name: (1.5 * p).detach().requires_grad_() for name, p in net.named_parameters()}
        (y,) = torch.func.functional_call(net, other, image())
        grads.append(torch.autograd.grad(y.sin().sum(), list(other.values())))
    assert same_bits(*grads)


def test_a_change_before_the_backward_is_noticed():
    net = chain(Widening, Following)
    y = net(image().requires_grad_())[0]
    with torch.no_grad():
        net[0].conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_models_do_not_hold_the_pyramid_unless_it_is_watched():
    net, x = tiny(), torch.randn(2, 3, 64, 96)
    watched = copy.deepcopy(net)
    seen = []
    watched.neck.register_forward_hook(lambda module, xs, ys: seen.extend(ys))

    def held(net) -> int:
        def forward():
            return net(x).square().sum()

        forward()
        return held_and_peak(forward)[0]

    chained, apart = held(net), held(watched)
    pyramid = sum(p.nbytes for p in seen[:4])
    assert len(seen) == 8 and apart - chained >= 0.9 * pyramid
    net, twin = tiny(), tiny()
    twin.load_state_dict(net.state_dict())
    twin.head.register_forward_pre_hook(lambda module, xs: None)
    assert_same_bits(results(net, x), results(twin, x))


def test_under_a_checkpoint_and_once_unpacked():
    net, x = tiny(), torch.randn(2, 3, 64, 96, requires_grad=True)
    twin = copy.deepcopy(net)
    net(x).sin().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(twin, x, use_reentrant=False).sin().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("between", [0, 1])
def test_a_detached_block_before_it_is_run_again(between):
    """The inputs come from the block before, also if that has no graph."""
    net = chain(Widening, *[Following] * between, Following)
    net[1 : 1 + between].requires_grad_(False)
    stored = copy.deepcopy(net)
    stored.reversible = False
    for each in (net, stored):
        each[0].register_forward_hook(lambda module, xs, ys: tuple(y.detach() for y in ys))
    assert_same_bits(*(gradients_of_last(each) for each in (net, stored)))
