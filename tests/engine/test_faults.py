"""Faults in a step: a clear error, and gradients and statistics as before the call."""

import pytest
import torch
from chains import LATTICE, Coupling, blocks, conv, plain, silos, streams, transform
from steps import assert_same_bits, gradients_of, loss_of, named_gradients
from torch import nn

from revbifpn_kernels import Reversible, ReversibleSequential, RevSilo

X = [torch.randn(2, c, s, s) for c, s in ((6, 8), (8, 4), (10, 2))]


class Incomplete(Reversible):
    def forward(self, x):
        return (x,)


def test_incomplete_blocks():
    with pytest.raises(NotImplementedError, match="Incomplete: inverse must be defined"):
        ReversibleSequential(Incomplete()).inverse(X[0])
    with pytest.raises(NotImplementedError, match="forward must be defined"):
        type("Bare", (Reversible,), {})()(X[0])


def test_draws_between_transforms():
    class Noisy(Coupling):
        def forward(self, a, b):
            return super().forward(a + torch.rand(1), b)

    net = Noisy(conv(6, 6), conv(6, 6))
    with pytest.raises(RuntimeError, match="Noisy: forward calls rand itself, which the backward"):
        net(X[0], X[0])


def assert_untouched(net, call, error, message):
    """`call` fails so, leaves every `.grad` alone, and the next step is right."""
    xs = streams(silos)
    expected = gradients_of(net, xs)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    before = named_gradients(net)
    with pytest.raises(error, match=message):
        call(xs)
    assert_same_bits(named_gradients(net), before)
    net.zero_grad()
    for name, b in net.named_buffers():
        b.copy_(buffers[name])
    again = gradients_of(net, xs)
    ours = {name: g for name, g in again.items() if name not in buffers}
    assert_same_bits(ours, {name: expected[name] for name in ours})


def test_backward_twice():
    net = silos(2)

    def call(xs):
        loss = loss_of(net(*xs))
        torch.autograd.grad(loss, list(net.parameters()))
        loss.backward()

    assert_untouched(net, call, RuntimeError, "backward through the graph a second time")


def test_double_backward():
    net = silos(2)

    def call(xs):
        loss_of(net(*xs)).backward(create_graph=True)

    assert_untouched(net, call, RuntimeError, r"create_graph=True.* set reversible=False")


def test_loss_without_the_last_outputs():
    net = silos(3)
    taps = []
    net[1].register_forward_hook(lambda module, args, ys: taps.append(ys[0]))

    def call(xs):
        net(*xs)
        taps[-1].sum().backward()

    message = (
        "RevSilo: cannot restore the inputs of block 1, .* depends on the chain's last outputs"
    )
    assert_untouched(net, call, RuntimeError, message)


def test_outputs_changed_in_place():
    net = silos(2)

    def call(xs):
        ys = net(*xs)
        loss = loss_of(ys)
        with torch.no_grad():
            ys[1].add_(1)
        loss.backward()

    assert_untouched(net, call, RuntimeError, "modified by an inplace operation")


@pytest.mark.parametrize("what", ["parameter", "running statistics in eval mode"])
def test_modules_changed_between_forward_and_backward(what):
    net = silos(2)
    changed = (
        net[0].down["0_1"][1].weight if what == "parameter" else net[0].down["0_1"][1].running_var
    )

    def call(xs):
        loss_of(net(*xs)).backward()
        net.zero_grad()
        if what != "parameter":
            net.eval()
        loss = loss_of(net(*xs))
        with torch.no_grad():
            changed.mul_(1)
        try:
            loss.backward()
        finally:
            net.train()
            for name, p in net.named_parameters():
                p.grad = before[name]

    before = {}
    xs = streams(silos)
    gradients_of(net, xs)
    before |= named_gradients(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call(xs)


def test_transform_with_state_of_its_own():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return x[:, :4].repeat(1, 2, 1, 1)

    net = RevSilo({(0, 1): Counting()})
    with pytest.raises(RuntimeError, match=r"the buffer 'mean' of shape \(6,\) changed"):
        net(X[0].clone().requires_grad_(), X[1])


@pytest.mark.parametrize("make", [transform, plain])
def test_exception_in_the_recompute(make):
    """Nothing is half-done: statistics, generators and modes are as after the forward."""

    class Failing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.fails = inner, False

        def forward(self, x):
            y = self.inner(x)
            if self.fails and torch.is_grad_enabled():
                raise MemoryError("as if out of memory")
            return y

    net = silos(2, make)
    failing = net[1].up["2_1"] = Failing(net[1].up["2_1"])

    def call(xs):
        loss = loss_of(net(*xs))
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        state = torch.get_rng_state()
        failing.fails = True
        try:
            loss.backward()
        finally:
            failing.fails = False
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())

    assert_untouched(net, call, MemoryError, "as if out of memory")


def test_the_same_error_without_lattice_range():
    """Beyond the range a stream is restored to rounding, and gradients stay right to it."""
    net = blocks(3, plain).eval()
    net.lattice = LATTICE
    (x,) = streams(blocks)
    with torch.no_grad():
        (restored,) = net.inverse(*net(1e5 * x))
    error = (restored - 1e5 * x).abs().max() / 1e5
    assert 0 < error < 1e-5
