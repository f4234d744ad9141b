"""Fused transforms run back without a graph, and cast their weights once per step."""

import copy

import pytest
import torch
from chains import blocks, mbconv, silos, streams
from operators import Operators
from steps import loss_of

from revbifpn_kernels import MBConv, RevBlock

over_kinds = pytest.mark.parametrize("kind", [silos, blocks])


def results(net, xs, *, reversible):
    """Gradients of the inputs and parameters, None where there are none."""
    net, xs = copy.deepcopy(net), [x.detach().requires_grad_(x.requires_grad) for x in xs]
    net.reversible = reversible
    for block in net:
        block.reversible = reversible
    torch.manual_seed(1)
    loss_of(net(*xs)).backward()
    return [x.grad for x in xs] + [p.grad for p in net.parameters()]


def assert_same_gradients(net, xs):
    ours, expected = (results(net, xs, reversible=r) for r in (True, False))
    largest = max(e.abs().max() for e in expected if e is not None)
    for grad, other in zip(ours, expected, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12 * largest.item())


@over_kinds
def test_no_graph_is_made(monkeypatch, kind):
    net, xs = kind(2, mbconv), streams(kind)
    loss = loss_of(net(*xs))

    def refuse(*args, **kwargs):
        raise AssertionError("a graph was differentiated")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@over_kinds
@pytest.mark.parametrize("frozen", ["nothing", "inputs", "norms", "all but one"])
def test_frozen_parameters_and_inputs(kind, frozen):
    net = kind(2, mbconv).double()
    xs = [x.requires_grad_(frozen != "inputs") for x in streams(kind, dtype=torch.float64)]
    for name, p in net.named_parameters():
        is_frozen = {"norms": "norm" in name, "all but one": not name.startswith("1.")}
        p.requires_grad_(not is_frozen.get(frozen, False))
    assert_same_gradients(net, xs)


def test_transforms_with_shared_parameters():
    net = blocks(2, lambda *_: MBConv(4, 4, expand_ratio=2.0)).double()
    for block in net:
        block.f.project.conv.weight = block.g.project.conv.weight
        block.g.depthwise = block.f.depthwise
    net[1].f.expand.norm.weight = net[1].f.depthwise.norm.weight  # twice in one transform
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(net, [x])


def test_weights_are_cast_once_per_step():
    net = RevBlock(*(MBConv(6, 6, expand_ratio=2.0) for _ in range(2)))
    with torch.autocast("cpu", torch.bfloat16), Operators() as forward:
        (y,) = net(torch.randn(2, 12, 6, 6))
    with Operators() as backward:
        y.square().mean().backward()
    weights = {tuple(p.shape) for p in net.parameters() if p.dim() == 4}
    for operators in (forward, backward):  # the weights forward, their gradients backward
        assert operators.counts["_foreach_copy_"] == 2
        copies = [args[0] for name, args, _ in operators.calls if name == "_to_copy"]
        assert not weights & set(copies)
