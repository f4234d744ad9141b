"""MBConv as one Function: what its modules compute one by one, on every path to it."""

import copy

import pytest
import torch
from helpers import same_bits
from mbconvs import LAYOUTS, OPTIONS, as_modules, image, make, results
from operators import Operators
from torch import nn
from torch.func import functional_call

from revbifpn_kernels import MBConv, RevBlock, Reversible
from revbifpn_kernels.mbconv import convolutions, transform

# PyTorch's hardsigmoid_backward holds 1/6 in float32, whatever the dtype.
AS_NEAR_AS_A_SIXTH = {"rtol": 1e-7, "atol": 1e-7}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the Function's code ran."""
    calls = []

    def counted(stages, x):
        calls.append(x.shape)
        return run_stages(stages, x)

    run_stages = transform.run_stages
    monkeypatch.setattr(transform, "run_stages", counted)
    return calls


def assert_close(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    norms = {name: value.double().norm().item() for name, value in expected.items()}
    least = 1e-3 * norms["grad of the input"]  # gradients that are zero but for rounding are small
    for name, value in ours.items():
        error = (value.double() - expected[name].double()).norm().item()
        assert error <= tolerance * max(norms[name], least), name


@over_options
@pytest.mark.parametrize("mode", ["batch statistics", "running statistics", "frozen expansion"])
def test_equals_its_modules(monkeypatch, fused_calls, options, mode):
    is_odd = (list(OPTIONS.values()).index(options) + len(mode)) % 2  # each layout with each option
    net, x = make(options), image(layout=list(LAYOUTS.values())[is_odd])
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in {"running statistics": norms, "frozen expansion": norms[:1]}.get(mode, []):
        norm.eval()
    ours = results(net, x)
    assert len(fused_calls) == 1
    assert_close(ours, as_modules(monkeypatch, net, x), 1e-11)


@pytest.mark.parametrize("is_slow", [True, False], ids=["by float32", "by halves"])
@over_options
def test_autocast_is_as_near_to_float64(monkeypatch, options, is_slow):
    monkeypatch.setattr(convolutions, "IS_HALF_SLOW", is_slow)
    net, x = make(options, torch.float32), image(torch.float32, torch.channels_last)
    exact = as_modules(monkeypatch, copy.deepcopy(net).double(), x.double())
    ours, theirs = results(net, x, "autocast"), as_modules(monkeypatch, net, x, "autocast")

    def error(found):
        names = [n for n in exact if "num_batches" not in n]
        parts = [(found[n].double() - exact[n]).flatten() for n in names]
        return torch.cat(parts).norm().item()

    assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16
    assert error(ours) <= 2 * error(theirs)


@pytest.mark.parametrize("is_slow", [True, False])
def test_evaluation_is_fused_where_half_precision_is_slow(monkeypatch, fused_calls, is_slow):
    monkeypatch.setattr(convolutions, "IS_HALF_SLOW", is_slow)
    net, x = make(OPTIONS["all"], torch.float32).eval(), image(torch.float32, torch.channels_last)
    net(x)
    assert not fused_calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert len(fused_calls) == is_slow and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [OPTIONS["all"], OPTIONS["large kernel"]], ids=["all", "large"])
def test_differentiates_twice(options):
    net = make(options | {"drop_path": 0.0, "act_layer": nn.SiLU}, channels=(2, 2))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x, fast_mode=True)
    inputs = [x, *net.parameters()]
    once, again = (torch.autograd.grad(net(x).sin().sum(), inputs, create_graph=c) for c in (0, 1))
    torch.testing.assert_close(once, again, **AS_NEAR_AS_A_SIXTH)


def test_hooks_run_once_though_differentiated_twice():
    net, x = make(OPTIONS["all"] | {"drop_path": 0.0}), image().requires_grad_()
    calls = []
    net.project.conv.weight.register_hook(lambda grad: calls.append(grad))
    torch.autograd.grad(net(x).sum(), [x, net.project.conv.weight], create_graph=True)
    assert len(calls) == 1


@pytest.mark.parametrize("training", [True, False], ids=["frozen after", "trained after"])
@pytest.mark.parametrize("twice", [False, True])
def test_modes_are_those_of_the_forward(training, twice):
    net, x = make(OPTIONS["all"] | {"drop_path": 0.0}), image().requires_grad_()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train(training)
    y = net(x)
    (expected,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
    net.train(not training)
    (ours,) = torch.autograd.grad(y.sin().sum(), x, create_graph=twice)
    torch.testing.assert_close(ours, expected, **AS_NEAR_AS_A_SIXTH)


def test_functional_call_trains_what_it_is_given(fused_calls):
    net, x = make(OPTIONS["all"] | {"drop_path": 0.0}), image()
    other = {k: (v * 1.5).detach().requires_grad_() for k, v in net.named_parameters()}
    functional_call(net, other, x).sum().backward()
    assert fused_calls and all(v.grad is not None for v in other.values())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("frozen", ["parameters", "input", "weights of convolutions"])
def test_what_is_frozen_gets_no_gradient(frozen):
    net, x = make(OPTIONS["all"]), image().requires_grad_(frozen != "input")
    for name, p in net.named_parameters():
        p.requires_grad_(frozen == "input" or (frozen != "parameters" and "conv" not in name))
    net(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def add_hook(net):
    net.depthwise.conv.register_forward_hook(lambda *_: None)


def replace_act(net):
    net.depthwise.act = nn.GELU()


def give_a_bias(net):
    net.project.conv.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))


def pad_circularly(net):
    net.depthwise.conv.padding_mode = "circular"


def dilate(net):
    net.depthwise.conv.dilation, net.depthwise.conv.padding = (2, 2), (2, 2)


def append(net):
    net.append(nn.Conv2d(24, 5, 1, dtype=torch.float64))


def average(net):
    net.project.norm.momentum = None


def put_an_attribute(net):  # as FSDP does
    weight = net.project.conv.weight
    del net.project.conv.weight
    net.project.conv.weight = weight.detach()


def stride_a_statistic(net):
    norm = net.project.norm
    norm.running_mean = torch.stack([norm.running_mean] * 2, 1)[:, 0]


CHANGES = [add_hook, replace_act, give_a_bias, pad_circularly, dilate, append, average]
CHANGES += [put_an_attribute, stride_a_statistic]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_run_as_modules(monkeypatch, fused_calls, change):
    net, x = make(OPTIONS["all"]), image()
    change(net)
    ours = results(net, x)
    assert not fused_calls
    assert_close(ours, as_modules(monkeypatch, net, x), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_networks_run_as_modules(fused_calls, dtype):
    net = make(OPTIONS["all"], dtype)
    net(image(dtype)).sum().backward()
    assert not fused_calls and net.project.conv.weight.grad.dtype == dtype


@over_layouts
def test_gradients_that_are_slices_or_expanded(layout):
    net, x = make(OPTIONS["plain"], channels=(16, 16)), image(layout=layout).requires_grad_()
    y = net(x)
    whole = torch.randn(3, 40, 12, 10, dtype=torch.float64).to(memory_format=layout)
    for grad in (whole[:, 8:24], y.new_ones(()).expand_as(y), whole[:, :32:2]):
        (ours,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        (expected,) = torch.autograd.grad(y, x, grad.clone().contiguous(), retain_graph=True)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_recompute_reuses_statistics_and_gates():
    """Nothing is reduced or drawn again, and no running statistic moves."""
    halves = [MBConv(8, 8, **OPTIONS["all"]) for _ in range(2)]
    block = RevBlock(*halves)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    (y,) = block(x)
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    with Operators() as operators:
        y.sum().backward()
    called = operators.counts.keys()
    assert "norm_act" in called and "norm_act_grad" in called
    repeated = {"batch_statistics", "batch_norm_factors", "norm_act_gates", "norm_factors"}
    assert not (repeated | {"bernoulli_"}) & called
    assert all(torch.equal(b, buffers[name]) for name, b in block.named_buffers())


def test_autocast_leaves_float64_alone():
    net = make(OPTIONS["all"])
    with torch.autocast("cpu", torch.bfloat16):
        assert net(image()).dtype == torch.float64


def test_an_mbconv_hidden_from_its_block_is_refused():
    class Sneaky(Reversible):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))
            self.hidden = [MBConv(4, 4)]  # a list hides it

        def forward(self, x):
            return (x + self.shift + self.hidden[0](x).mean(),)

        def inverse(self, y):
            return (y - self.shift,)

    with pytest.raises(RuntimeError, match="forward calls batch_norm itself"):
        Sneaky()(torch.randn(2, 4, 6, 6))


def test_equal_steps_have_the_same_bits():
    net, x = make(OPTIONS["all"], torch.float32), image(torch.float32, torch.channels_last)
    assert same_bits(results(net, x)["output"], results(net, x)["output"])


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="MBConv: batch norm needs more than 1 value per channel"):
        make(OPTIONS["plain"])(torch.randn(1, 16, 1, 1, dtype=torch.float64))
