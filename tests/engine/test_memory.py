"""What is held between forward and backward does not grow with depth; the peak has a formula."""

import pytest
import torch
from chains import LATTICE, blocks, growing, levels, mbconv, plain, silos, streams
from steps import loss_of
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.lib.memory import held_and_peak


def held(net, xs) -> int:
    """Bytes between forward and backward, beyond the loss's own."""
    cotangents = [torch.randn_like(y) for y in net(*xs)]

    def forward():
        return sum((y * c).sum() for y, c in zip(net(*xs), cotangents, strict=True))

    forward()  # warm: what PyTorch allocates once
    return held_and_peak(forward)[0]


def nodes_of(ys) -> list:
    """The autograd nodes of the blocks of one call, last to first."""
    found, pending = {}, [ys[0].grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found and hasattr(node, "call"):
            found[node] = None
            pending += [parent for parent, _ in node.next_functions]
    return list(found)


def saved_for_recompute(ys) -> list[torch.Tensor]:
    """Masks, generators' states, statistics."""
    traces = [node.call.trace for node in nodes_of(ys)]
    records = [record for trace in traces for calls in trace.records.values() for record in calls]
    events = [event for record in records for event in record.events]
    leaves = tree_leaves([tuple(e) if isinstance(e, (tuple, list)) else e for e in events])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def saved_bytes(net, xs) -> int:
    """What the graph saves beyond parameters and buffers, each storage counted once."""
    known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = net(*xs)
    return sum(sizes.values()) + sum(t.nbytes for t in saved_for_recompute(ys))


@pytest.mark.parametrize("kind", [silos, growing, blocks, levels])
def test_activations_do_not_grow_with_depth(kind):
    xs = streams(kind)
    shallow, deep = (held(kind(depth, plain), xs) for depth in (2, 32))
    assert deep == shallow
    loss_bytes = 4
    assert shallow == sum(y.nbytes for y in kind(2, plain)(*xs)) + loss_bytes


@pytest.mark.parametrize("kind", [silos, growing, blocks, levels])
def test_saved_tensors_are_the_last_streams(kind):
    xs = streams(kind)
    for depth in (2, 16):
        net = kind(depth, plain)
        assert saved_bytes(net, xs) == sum(y.nbytes for y in net(*xs))


def test_growth_is_masks_and_statistics():
    """MBConv saves a mask per sample and, on large maps, two numbers per channel."""
    xs = streams(silos, batch=2, side=128)
    found = {}
    for depth in (2, 8):
        net = silos(depth, mbconv)
        saved = saved_for_recompute(net(*xs))
        assert all(t.numel() <= 2 * max(12, 20) for t in saved)
        found[depth] = held(net, xs), sum(-(-t.nbytes // 64) * 64 for t in saved)
    growth, saved = (deep - shallow for shallow, deep in zip(*found.values(), strict=True))
    assert 0 < growth <= saved


def test_exact_mode_holds_no_more():
    xs = streams(silos)
    net = silos(4, plain)
    before = held(net, xs)
    net.lattice = LATTICE
    assert held(net, xs) <= before


def test_peak_of_a_step():
    """Streams twice (those held and those restored), gradients twice (in and out), a transform.

    The formula of docs/memory.md; what a transform's graph takes is measured alone.
    """
    xs = [x.requires_grad_() for x in streams(silos, batch=4, side=32)]
    net = silos(6, plain)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    every_stream = sum(x.nbytes for x in xs)

    def forward():
        return loss_of(net(*xs))

    forward().backward()
    _, peak = held_and_peak(forward)
    assert peak <= 4 * every_stream + largest_transform(net[0], xs) + largest_stream(xs)


def largest_transform(silo, xs) -> int:
    """The most that the graphs of the edges onto one level take, with their gradients."""

    def of_level(level: int) -> int:
        def forward():
            total = 0
            for half in (silo.down, silo.up):
                for key, module in half.items():
                    i, j = map(int, key.split("_"))
                    if j == level:
                        total = total + module(xs[i]).sum()
            return total

        forward().backward()
        return held_and_peak(forward)[1]

    return max(of_level(level) for level in range(silo.levels))


def largest_stream(xs) -> int:
    return max(x.nbytes for x in xs)


def test_stored_activations_do_grow():
    """The counter sees growth where there is some."""
    xs = streams(silos)
    nets = [silos(depth, plain) for depth in (2, 4)]
    for net in nets:
        net.reversible = False
    shallow, deep = (held(net, xs) for net in nets)
    assert deep > 1.8 * shallow
    assert isinstance(nets[0], nn.Sequential)
