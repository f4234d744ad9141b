"""Modules store no state of a step: copies, threads, evaluation and swapped parameters work."""

import copy
import pickle
import threading

import pytest
import torch
from chains import LATTICE, exact_pair, growing, mbconv, over_kinds, plain, silos, stored, streams
from steps import assert_same_bits, gradients_of, loss_of, named_gradients, relative_error
from torch import nn


@over_kinds
def test_deepcopy_pickle_state_dict(kind):
    chain = kind(2, mbconv).double()
    xs = streams(kind, dtype=torch.float64)
    copies = [copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), kind(2, mbconv).double()]
    copies[2].load_state_dict(chain.state_dict())
    expected = gradients_of(chain, xs)
    for net in copies:
        assert_same_bits(gradients_of(net, xs), expected)
    # With a graph alive, too.
    loss = loss_of(chain(*xs))
    copy.deepcopy(chain)
    loss.backward()


def test_threads():
    chain = silos(2, plain)
    chain.lattice = LATTICE
    inputs = [streams(silos) for _ in range(4)]
    expected = [torch.autograd.grad(loss_of(chain(*xs)), list(chain.parameters())) for xs in inputs]
    results = [None] * len(inputs)

    def work(k):
        for _ in range(3):
            loss = loss_of(chain(*inputs[k]))
            results[k] = torch.autograd.grad(loss, list(chain.parameters()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@over_kinds
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation(kind, guard):
    chain = kind(2).eval()
    twin = stored(chain)
    xs = streams(kind)
    with guard():
        for ours, theirs in zip(chain(*xs), twin(*xs), strict=True):
            assert torch.equal(ours, theirs)
    before = [x.clone() for x in xs]
    assert all(torch.equal(x, b) for x, b in zip(xs, before, strict=True))


@over_kinds
def test_modules_in_eval_mode_inside_a_training_step(kind):
    chain = kind(2).double()
    for module in chain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    xs = streams(kind, dtype=torch.float64)
    expected = gradients_of(stored(chain), xs)
    assert relative_error(gradients_of(chain, xs), expected) < 1e-9


def test_eval_between_forward_and_backward():
    results = []
    for net in exact_pair(silos):
        torch.manual_seed(3)
        loss = loss_of(net(*streams(silos)))
        net.eval()
        loss.backward()
        assert not any(module.training for module in net.modules())
        results.append(named_gradients(net))
    assert_same_bits(*results)


def test_functional_call():
    results = []
    for net in exact_pair(silos):
        torch.manual_seed(3)
        xs = streams(silos)
        base = {name: p.detach() * 1.5 for name, p in net.named_parameters()}
        leaves = {name: p.requires_grad_() for name, p in base.items()}
        derived = {name: 2 * p for name, p in leaves.items()}
        loss = loss_of(torch.func.functional_call(net, derived, tuple(xs)))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results.append(dict(zip(leaves, grads, strict=True)))
        assert named_gradients(net) == {}
    assert_same_bits(*results)


def test_inputs_and_outputs_are_not_written_to():
    chain = growing(2)
    xs = [x.requires_grad_() for x in streams(growing)]
    ys = chain(*xs)
    before = [t.detach().clone() for t in (*xs, *ys)]
    loss_of(ys).backward()
    assert all(torch.equal(t, b) for t, b in zip((*xs, *ys), before, strict=True))


def test_compiled_chains():
    """The compiler leaves the engine alone; without it, one graph holds the chain."""
    chain = silos(2, plain).double()
    xs = streams(silos, dtype=torch.float64)
    expected = gradients_of(stored(chain), xs)
    ours = gradients_of(torch.compile(chain, backend="aot_eager"), xs)
    ours = {name.replace("_orig_mod.", ""): value for name, value in ours.items()}
    assert relative_error(ours, expected) < 1e-12
    chain.eval()
    with torch.no_grad():
        expected = chain(*xs)
        compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)(*xs)
        exported = torch.export.export(chain, tuple(xs)).module()(*xs)
    for results in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_replicas_of_data_parallel_train_under_plain_autograd():
    """Their parameters are not where a module's are, so the engine would not see them."""
    for net in (silos(2, plain), silos(1, plain)[0]):
        replica = net._replicate_for_data_parallel()
        y = replica(*streams(silos))[0]
        assert y.requires_grad and type(y.grad_fn).__name__ != "_BlockBackward"
