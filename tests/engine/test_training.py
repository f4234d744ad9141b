"""What users bring to a training step works as under plain autograd, with the same gradients."""

import pytest
import torch
from chains import (
    blocks,
    couplings,
    exact_pair,
    growing,
    levels,
    mbconv,
    over_kinds,
    plain,
    silos,
    stored,
    streams,
    transform,
)
from steps import assert_same_bits, gradients_of, loss_of, named_gradients, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("kind", [silos, blocks, couplings])
def test_gradient_accumulation(kind):
    chain = kind(2).double()
    twin = stored(chain)
    for net in (chain, twin):
        for seed in range(3):
            torch.manual_seed(seed)
            loss_of(net(*streams(kind, dtype=torch.float64))).backward()
    assert relative_error(named_gradients(chain), named_gradients(twin)) < 1e-9


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around(use_reentrant):
    results = []
    for net in exact_pair(silos, make=mbconv):
        torch.manual_seed(1)
        xs = [x.requires_grad_() for x in streams(silos)]
        ys = checkpoint(net, *xs, use_reentrant=use_reentrant)
        loss_of(ys).backward()
        results.append(named_gradients(net) | {str(k): x.grad for k, x in enumerate(xs)})
    assert_same_bits(*results)


@pytest.mark.parametrize("kind", [growing, levels, couplings])
def test_frozen_parameters(kind):
    chain = kind(3).double()
    for k, p in enumerate(chain.parameters()):
        p.requires_grad_(k % 3 == 0)
    for p in chain[0].parameters():
        p.requires_grad_(False)
    xs = streams(kind, dtype=torch.float64)
    expected = gradients_of(stored(chain), xs)
    assert relative_error(gradients_of(chain, xs), expected) < 1e-9


class CountBackwards(nn.Module):
    """A transform that counts gradients asked of its input, and runs."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.runs, self.input_gradients = inner, 0, 0

    def forward(self, x):
        self.runs += 1
        if x.requires_grad and torch.is_grad_enabled():
            x.register_hook(lambda grad: self._count())
        return self.inner(x)

    def _count(self):
        self.input_gradients += 1


def test_no_gradient_for_a_frozen_input():
    chain = silos(2, plain)
    for block in chain:
        block.down["0_1"] = CountBackwards(block.down["0_1"])
    loss_of(chain(*streams(silos))).backward()
    assert chain[0].down["0_1"].input_gradients == 0
    assert chain[1].down["0_1"].input_gradients == 1


def test_frozen_blocks_before_the_first_trained_one_are_not_run_again():
    chain = silos(3, plain)
    for block in chain:
        block.down["0_1"] = CountBackwards(block.down["0_1"])
    for block in chain[:2]:
        block.requires_grad_(False)
    loss_of(chain(*streams(silos))).backward()
    assert [block.down["0_1"].runs for block in chain] == [1, 1, 2]
    assert all(p.grad is not None for p in chain[2].parameters())


@over_kinds
def test_a_block_used_twice(kind):
    chain = kind(1)
    chain.append(chain[-1])
    chain.double()
    xs = streams(kind, dtype=torch.float64)
    twin = stored(chain)
    assert twin[-1] is twin[-2]
    expected = gradients_of(twin, xs)
    assert relative_error(gradients_of(chain, xs), expected) < 1e-9


@pytest.mark.parametrize(
    "make, order", [(transform, (0, 1, 2)), (mbconv, (2, 1, 0)), (mbconv, (1, 2, 0))]
)
def test_forwards_before_backwards(make, order):
    """Also a forward without gradients, on other data, between the two."""
    results = []
    for net in exact_pair(silos, make=make):
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            losses.append(loss_of(net(*streams(silos))))
        with torch.no_grad():
            net(*streams(silos))
        for k in order:
            losses[k].backward()
        results.append(named_gradients(net))
    assert_same_bits(*results)


def test_auxiliary_loss_on_an_intermediate():
    chain = silos(3, plain).double()
    results = []
    for net in (stored(chain), chain):
        taps = []
        net[1].register_forward_hook(lambda module, args, ys, taps=taps: taps.append(ys[1]))
        torch.manual_seed(3)
        ys = net(*streams(silos, dtype=torch.float64))
        (loss_of(ys) + taps[0].square().mean()).backward()
        results.append(named_gradients(net))
    assert relative_error(results[1], results[0]) < 1e-12


def test_autograd_grad_and_retain_graph():
    for net in (silos(2, plain).double(), stored(silos(2, plain).double())):
        xs = [x.requires_grad_() for x in streams(silos, dtype=torch.float64)]
        loss = loss_of(net(*xs))
        wanted = [*net[0].parameters(), xs[0]]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, retain_graph=True)
        only_last = torch.autograd.grad(loss, list(net[1].parameters()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        loss.backward()
        grads = [*(p.grad for p in net[0].parameters()), xs[0].grad]
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
        assert all(
            torch.equal(a, p.grad) for a, p in zip(only_last, net[1].parameters(), strict=True)
        )


def test_two_losses_on_one_forward():
    results = []
    for net in exact_pair(silos, make=plain):
        torch.manual_seed(3)
        ys = net(*streams(silos))
        ys[0].square().mean().backward(retain_graph=True)
        ys[2].square().mean().backward()
        results.append(named_gradients(net))
    assert_same_bits(*results)


@pytest.mark.parametrize("make", [transform, mbconv], ids=["plain", "mbconv"])
@pytest.mark.parametrize("is_evaluated", [False, True], ids=["", "then-eval"])
def test_hooks_on_parameters_see_the_gradient_once(make, is_evaluated):
    """Also if the modules' modes differ in the backward."""
    results, seen = [], []
    for net in exact_pair(silos, make=make):
        for p in net.parameters():
            p.register_hook(lambda grad: seen.append(1) or 2 * grad)
        torch.manual_seed(3)
        loss = loss_of(net(*streams(silos)))
        if is_evaluated:
            net.eval()
        loss.backward()
        results.append(named_gradients(net) | dict(net.named_buffers()))
        assert len(seen) == len(list(net.parameters()))
        seen.clear()
    assert_same_bits(*results)


def test_optimizer_step_inside_backward():
    results = []
    for net in exact_pair(silos, depth=3):
        order = []
        for name, p in net.named_parameters():
            optimizer = torch.optim.SGD([p], lr=0.1)

            def step(p, optimizer=optimizer, name=name, order=order):
                optimizer.step()
                optimizer.zero_grad()
                order.append(name)

            p.register_post_accumulate_grad_hook(step)
        for seed in range(2):
            torch.manual_seed(seed)
            loss_of(net(*streams(silos))).backward()
        assert order[0].startswith("2.") and order[len(order) // 2 - 1].startswith("0.")
        results.append(dict(net.named_parameters()) | dict(net.named_buffers()))
    assert_same_bits(*results)
