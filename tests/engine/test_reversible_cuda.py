"""The engine on a GPU: gradients, exactness, memory, and a whole step in a CUDA graph."""

import copy
import gc

import pytest
import torch
from chains import (
    KINDS,
    LATTICE,
    MAKES,
    exact_pair,
    mbconv,
    plain,
    silos,
    stored,
    streams,
    transform,
)
from steps import assert_same_bits, gradients_of, loss_of, relative_error
from tiny import tiny

from benchmarks.lib.memory import held_and_peak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
over_kinds = pytest.mark.parametrize("kind", KINDS[:4])  # those with fused backwards
over_makes = pytest.mark.parametrize("make", MAKES)
# Restored inputs have rounding errors besides those of the gradients' own arithmetic.
RESTORED = 8


def on_gpu(kind, depth, make, **options):
    return kind(depth, make).cuda(), [x.cuda() for x in streams(kind, **options)]


def without_draws(net):
    """The network, which drops nothing any more."""
    for module in net.modules():
        for name in {"p", "probability"} & vars(module).keys():
            setattr(module, name, 0.0)
    return net


def moved(block, args, ys):
    """A hook: a rounding error of the largest value in each element, as restoring leaves."""
    generator = torch.Generator(ys[0].device).manual_seed(0)  # draws of the network stay the same
    steps = (torch.finfo(y.dtype).eps * y.detach().abs().max() for y in ys)
    noise = (torch.empty_like(y).normal_(generator=generator) for y in ys)
    return tuple(y + step * n for y, step, n in zip(ys, steps, noise, strict=True))


def rounding_of(net, xs, exact) -> float:
    """How far rounding errors in each block's results take the gradients from the `exact` ones.

    It tells how much the network amplifies them, and what its convolutions round to.
    """
    twin = stored(net)
    for block in twin:
        block.register_forward_hook(moved)
    return relative_error(only_gradients(twin, xs), exact)


def only_gradients(net, xs):
    """Of inputs and parameters; running means may be zero but for rounding."""
    names = {name for name, _ in net.named_buffers()}
    found = gradients_of(net, xs)
    return {name: grad for name, grad in found.items() if name not in names}


@over_kinds
@over_makes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients(kind, make, layout):
    net, xs = on_gpu(kind, 2, make, batch=8, side=32)
    net.to(memory_format=layout)
    xs = [x.contiguous(memory_format=layout) for x in xs]
    exact = only_gradients(stored(net), xs)
    allowed = RESTORED * rounding_of(net, xs, exact)
    assert relative_error(only_gradients(net, xs), exact) < allowed


@over_kinds
@over_makes
@pytest.mark.parametrize("is_autocast", [False, True])
def test_exact_mode_restores_every_bit(kind, make, is_autocast):
    """`check` runs each transform twice, as the backward does, and compares the bits."""
    net, xs = on_gpu(kind, 3, make, side=96)  # beyond batch_norm.SMALL
    net.lattice, net.check = LATTICE, True
    with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
        loss_of(net(*xs)).backward()
    net.eval()
    xs = [(x / LATTICE).round() * LATTICE + 0.0 for x in xs]
    with torch.no_grad():
        for x, restored in zip(xs, net.inverse(*net(*xs)), strict=True):
            assert torch.equal(x, restored)


@over_kinds
@pytest.mark.parametrize("make", [plain, mbconv])
def test_exact_mode_has_the_bits_of_stored_activations(kind, make):
    """Of foreign batch norms it has not: where activations are stored, cuDNN computes them."""
    chain, twin = (net.cuda() for net in exact_pair(kind, 2, make))
    xs = [x.cuda() for x in streams(kind, side=32)]
    assert_same_bits(gradients_of(chain, xs), gradients_of(twin, xs))


@over_kinds
def test_activations_do_not_grow_with_depth(kind):
    found = []
    for depth in (2, 32):
        net, xs = on_gpu(kind, depth, plain)

        def forward(net=net, xs=xs):
            return loss_of(net(*xs))

        forward().backward()
        gc.collect()  # of tests before: it would count as released
        found.append(held_and_peak(forward, "cuda")[0])
    assert found[0] == found[1]


WARM_UPS = 3


def captured(step) -> torch.cuda.CUDAGraph:
    """The graph of a step, after `WARM_UPS` of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("make", [plain, mbconv])
@pytest.mark.parametrize("is_exact", [False, True])
def test_whole_step_in_a_cuda_graph(make, is_exact):
    net, xs = on_gpu(silos, 2, make, side=32)
    net.lattice = LATTICE if is_exact else None
    without_draws(net)  # a replay would draw anew, and could not be compared with eager

    def step():
        for p in net.parameters():
            p.grad.zero_()
        loss_of(net(*xs)).backward()

    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    graph = captured(step)
    for x in xs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = {name: p.grad.clone() for name, p in net.named_parameters()}
    step()
    eager = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert relative_error(replayed, eager) < 1e-5


@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_network_s_step_in_a_cuda_graph(is_autocast):
    """Forward, backward and optimizer of a whole RevBiFPN."""
    net, image = tiny().cuda(), torch.randn(4, 3, 64, 64, device="cuda")
    target = torch.arange(4, device="cuda")
    twin = copy.deepcopy(net)

    def step_of(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
                loss = torch.nn.functional.cross_entropy(net(image), target)
            loss.backward()
            optimizer.step()

        return step

    captured(step_of(net)).replay()
    step = step_of(twin)
    for _ in range(WARM_UPS + 1):
        step()
    replayed, eager = (
        torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (net, twin)
    )
    allowed = 1e-2 if is_autocast else 1e-4
    assert relative_error({"weights": replayed}, {"weights": eager}) < allowed


def test_masks_are_repeated_in_a_cuda_graph():
    """Stochastic depth: each replay draws, and its backward uses what its forward drew."""
    net, xs = on_gpu(silos, 1, mbconv, batch=16)
    net.check = False
    graph = torch.cuda.CUDAGraph()

    def step():
        loss = loss_of(net(*xs))
        return loss, torch.autograd.grad(loss, list(net.parameters()))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss, grads = step()
    losses = []
    for _ in range(2):
        graph.replay()
        losses.append(loss.item())
        assert all(grad.isfinite().all() for grad in grads)
    assert losses[0] != losses[1]


def test_elementwise_dropout_cannot_be_captured():
    net, xs = on_gpu(silos, 1, transform, side=64)
    loss_of(net(*xs)).backward()
    with pytest.raises(RuntimeError, match="random numbers whose generator's state cannot be"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            net(*xs)
