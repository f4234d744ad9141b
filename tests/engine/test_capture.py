"""`capture_step`: what a graph replays, and what is put back after the warm-up."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from captures import (
    assert_same_state,
    batches,
    eager_step,
    linear,
    sgd,
    small,
    update_on_cpus,
)
from helpers import same_bits
from tiny import tiny

from revbifpn_kernels import capture, capture_step


@pytest.mark.parametrize(
    ("make", "optimizer", "is_in_graph", "scales"),
    [
        (tiny, sgd, True, False),
        (small, sgd, False, True),
        (small, lambda net: sgd(net, dampening=0.5), False, False),
        (small, lambda net: torch.optim.NAdam(net.parameters()), False, False),
    ],
    ids=["SGD", "scaler", "dampening", "NAdam"],
)
def test_replays_train_as_steps_one_by_one(graphs, make, optimizer, is_in_graph, scales):
    """While the learning rate changes, and one of the batches is of another shape."""
    net = make()
    twin = copy.deepcopy(net)
    optimizers = [optimizer(each) for each in (net, twin)]
    scalers = [torch.amp.GradScaler("cpu") if scales else None for _ in range(2)]
    example, *others = batches(3)
    step = capture_step(
        net, F.cross_entropy, optimizers[0], example, max_norm=1.0, scaler=scalers[0]
    )
    assert step.updates_in_graph == is_in_graph and step.obstacle is None
    others.insert(1, batches(1, images=2)[0])
    for k, batch in enumerate(others):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 / (k + 1)
        loss = step(*batch)
        expected, norm = eager_step(twin, optimizers[1], batch, 1.0, scalers[1])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.grad_norm, norm, rtol=1e-3, atol=1e-5)
    assert [graph.replays for graph in graphs] == [2]
    assert_same_state(net, twin)


def test_the_warm_up_is_undone(graphs):
    """Weights, running statistics, momentum and random numbers, bit for bit."""
    net = tiny(drop_path_rate=0.1)
    optimizer, (first, example) = sgd(net), batches(2)
    eager_step(net, optimizer, first)

    def state():
        states = [net.state_dict(), list(optimizer.state.values()), torch.get_rng_state().int()]
        return copy.deepcopy(states)

    before = state()
    capture_step(net, F.cross_entropy, optimizer, example)
    assert same_bits(state(), before)


def test_only_the_model_s_gpu_is_asked_for_its_random_numbers(graphs, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: asked.append(devices) or nullcontext()
    )
    with capture._on_side_stream(torch.device("cuda", 1)):
        assert asked == [[1]]


def test_the_example_is_not_written_to(graphs):
    net, optimizer, example = linear()
    before = copy.deepcopy(example)
    capture_step(net, F.cross_entropy, optimizer, example)(torch.randn(2, 8), torch.ones(2).long())
    assert same_bits(example, before)


def test_a_new_state_of_the_optimizer_starts_with_zeros(graphs):
    net, optimizer, batch = linear()
    capture_step(net, F.cross_entropy, optimizer, batch)
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(buffers) == len(list(net.parameters()))
    assert not any(buffer.any() for buffer in buffers)


def test_losses_and_norms_are_not_overwritten(graphs):
    net, optimizer, batch = linear()
    step = capture_step(net, F.cross_entropy, optimizer, batch, max_norm=1.0)
    found = []
    for _ in range(2):
        found += [step(*batch), step.grad_norm]
    assert len({tensor.data_ptr() for tensor in found}) == 4


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("lattice", [None, 2**-12])
def test_no_operator_of_a_step_waits_for_the_device(graphs, lattice, is_autocast):
    net = tiny(lattice=lattice, drop_path_rate=0.1)
    dtype = torch.bfloat16 if is_autocast else None
    example, other = batches(2)
    arguments = F.cross_entropy, sgd(net), example
    step = capture_step(net, *arguments, autocast=dtype, max_norm=1.0)
    assert step.obstacle is None and step(*other).isfinite()


@pytest.mark.parametrize("kind", capture.CAPTURABLE)
def test_no_captured_update_waits_for_the_device(graphs, monkeypatch, kind):
    """Nor reads a learning rate that has been captured: another one changes the update."""
    update_on_cpus(monkeypatch, kind)
    net, _, batch = linear()
    optimizer = kind(net.parameters(), lr=0.01)
    step = capture_step(net, F.cross_entropy, optimizer, batch)
    assert step.updates_in_graph
    step(*batch)
    before, changes = copy.deepcopy(net.weight.detach()), []
    for lr in (0.01, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        step(*batch)
        changes.append((net.weight - before).abs().max().item())
        before = copy.deepcopy(net.weight.detach())
    assert changes[0] > 0 and changes[1] == 0
