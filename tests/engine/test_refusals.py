"""What would go wrong in silence is repeated rightly, or refused with a message."""

import threading

import pytest
import torch
from chains import LATTICE, pair_of, plain, silos, stored, streams, transform
from steps import gradients_of, loss_of, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from revbifpn_kernels import RevBlock, ReversibleSequential

X = torch.randn(2, 8, 6, 6)


def double(module, args, ys):
    return tuple(2 * y for y in ys)


def double_in_place(module, args, ys):
    with torch.no_grad():
        ys[0].mul_(2)


@pytest.mark.parametrize("hook", [double, double_in_place])
def test_hooks_that_change_streams(hook):
    net = silos(3, plain)
    net[1].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="RevSilo: the inputs of block 2 are not the outputs"):
        net(*streams(silos))


def test_hooks_that_change_nothing():
    net = silos(3, plain).double()
    for block in net:
        block.register_full_backward_hook(lambda module, grad_in, grad_out: None)
        block.register_forward_pre_hook(lambda module, args: None)
    xs = streams(silos, dtype=torch.float64)
    expected = gradients_of(stored(net), xs)
    assert relative_error(gradients_of(net, xs), expected) < 1e-9


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpoint_inside_a_transform():
    chain, _ = pair_of(lambda: Checkpointed(transform(4, 4)))
    with pytest.raises(
        RuntimeError, match="RevBlock: g draws or normalises under torch.utils.checkpoint"
    ):
        loss_of(chain(X)).backward()
    chain, twin = pair_of(lambda: Checkpointed(plain(4, 4)))  # draws nothing: may be run again
    expected = gradients_of(twin, [X])
    assert relative_error(gradients_of(chain, [X]), expected) == 0


class DirectNorm(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.norm, self.function = nn.BatchNorm2d(4), function

    def forward(self, x):
        n = self.norm
        return self.function(x, n.weight, n.bias, n.running_mean, n.running_var)


def test_batch_norm_called_directly():
    def direct(x, *tensors):
        return torch.batch_norm(x * 1, *tensors, True, 0.1, 1e-5, False)

    chain, twin = pair_of(lambda: DirectNorm(direct))
    expected = gradients_of(twin, [X])
    assert relative_error(gradients_of(chain, [X]), expected) < 1e-6

    def hidden(x, *tensors):
        return torch.native_batch_norm(x, *tensors, True, 0.1, 1e-5)[0]

    chain, _ = pair_of(lambda: DirectNorm(hidden))
    with pytest.raises(RuntimeError, match="f calls native_batch_norm, whose running statistics"):
        chain(X)


def test_counters_that_transforms_read():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            self.steps.add_(1)
            return self.inner(x) * self.steps

    chain, _ = pair_of(Counted)
    with pytest.raises(RuntimeError, match=r"the buffer 'steps' of shape \(\) changed"):
        chain(X)


def test_scripted_transforms():
    def scripted():
        return torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.ReLU()))

    chain = ReversibleSequential(*(RevBlock(scripted(), scripted()) for _ in range(2)))
    chain.reversible = False  # PyTorch's copies of scripted modules have no leaves
    expected = gradients_of(chain, [X])
    expected = {name: value.clone() for name, value in expected.items()}
    chain.zero_grad()
    chain.reversible = True
    assert relative_error(gradients_of(chain, [X]), expected) < 1e-5


def test_replaced_forwards():
    chain, twin = pair_of(lambda: transform(4, 4))
    expected = gradients_of(twin, [X])
    for block in chain:
        block.f.forward = torch.compile(block.f.forward, backend="eager")
    assert relative_error(gradients_of(chain, [X]), expected) < 1e-6


def test_lazy_modules():
    net = ReversibleSequential(RevBlock(nn.LazyConv2d(4, 1), nn.LazyConv2d(4, 1)))
    with pytest.raises(RuntimeError, match="a lazy module has no parameters yet; expected one fo"):
        net(X)
    with torch.no_grad():
        net(X)
    expected = gradients_of(stored(net), [X])
    assert relative_error(gradients_of(net, [X]), expected) < 1e-5


def test_threads_with_hooks_on_parameters():
    net = ReversibleSequential(RevBlock(plain(4, 4), plain(4, 4)), lattice=LATTICE)
    seen = []
    for p in net.parameters():
        p.register_hook(lambda grad: seen.append(1))

    def work():
        for _ in range(10):
            net(X)[0].square().sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40 * len(list(net.parameters()))
    (total,) = (p.grad for name, p in net.named_parameters() if name == "0.f.0.weight")
    net.zero_grad()
    net(X)[0].square().sum().backward()
    torch.testing.assert_close(total, 40 * net[0].f[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_what_hooks_saw():
    net = silos(1, plain).eval()
    seen = []
    for module in (*net[0].up.values(), *net[0].down.values()):
        module.register_forward_hook(lambda m, args, y: seen.append((args[0], args[0].clone(), y)))
    with torch.no_grad():
        net(*streams(silos))
    assert len(seen) == 6
    assert all(torch.equal(x, before) for x, before, _ in seen)
