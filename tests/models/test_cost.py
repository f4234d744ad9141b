"""The costs that are computed for a model, against the published numbers and a real step."""

import pytest
import torch
from tiny import TWO_LEVELS, tiny

from benchmarks.lib.memory import held_and_peak
from revbifpn_kernels import __main__ as command
from revbifpn_kernels import create_model, macs, revbifpn_s0, training_memory

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20
PUBLISHED = {  # parameters, MACs
    "revbifpn_s0": (3_419_196, 308_039_716),
    "revbifpn_s1": (5_112_300, 616_781_508),
    "revbifpn_s2": (10_576_528, 1_370_329_000),
    "revbifpn_s3": (19_574_184, 3_330_873_312),
    "revbifpn_s4": (48_687_336, 10_632_222_080),
    "revbifpn_s5": (81_998_976, 21_848_995_912),
    "revbifpn_s6": (142_307_972, 38_084_434_748),
}


@pytest.mark.parametrize(
    "name", ["revbifpn_s0", *(pytest.param(n, marks=pytest.mark.slow) for n in list(PUBLISHED)[1:])]
)
def test_published_numbers(name):
    with torch.device("meta"):
        net = create_model(name)
    counted = sum(p.numel() for p in net.parameters()), macs(net).official
    assert counted == PUBLISHED[name]


def test_multiply_adds_agree_with_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    net = tiny(**TWO_LEVELS).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, 3, 96, 96))
    assert 2 * macs(net, 96).multiply_adds == counter.get_total_flops()


@pytest.mark.parametrize("reversible", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_memory_agrees_with_a_real_step(reversible):
    net = revbifpn_s0(reversible=reversible)
    image = torch.randn(4, 3, 128, 128)
    net(image).sum().backward()  # later steps add to gradients that are there
    held, peak = held_and_peak(lambda: net(image).sum())
    predicted = training_memory(net, tuple(image.shape))
    assert predicted.held == pytest.approx(held, rel=0.01)
    workspaces = 8 * MIB  # of libraries, which no operator returns
    assert predicted.peak <= peak <= predicted.peak + workspaces


@pytest.mark.slow
def test_memory_of_the_largest_size():
    with torch.device("meta"):
        net = create_model("revbifpn_s6")
    held, peak = training_memory(net, (1, 3, 352, 352))
    authors = 0.074 * 2**30  # held, measured on their code
    assert held < authors / 2 and peak < 0.2e9


def test_counting_leaves_the_model_alone_and_calls_no_hooks_of_users():
    net, calls = tiny(**TWO_LEVELS), []
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for module in net.modules():
        module.register_forward_hook(lambda module, args, output: calls.append(output))
    macs(net, 64)
    training_memory(net, (2, 3, 64, 64), autocast=torch.bfloat16)
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not calls


@pytest.mark.parametrize("side", [0, 31, 64.0, True])
def test_sides_that_no_model_takes(side):
    with pytest.raises(ValueError, match=f"macs: side must be a whole number .* got {side}"):
        macs(tiny(), side)


def test_a_frozen_model_holds_nothing():
    net = tiny(**TWO_LEVELS).requires_grad_(False)
    assert training_memory(net, (2, 3, 64, 64)).held < MIB / 4


def test_info_shows_every_operator_and_device(capsys, monkeypatch):
    names = ["aten::add", "revbifpn::resample_add", "revbifpn::new"]
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: names)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key == "CPU"
    )
    command.print_backends()
    _, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    kernels = "C++ (CPU), PyTorch's own (CUDA)".split()
    assert lines == [["new", *kernels], ["resample_add", *kernels]]


def test_info(capsys, monkeypatch):
    def small(name, reversible):
        assert name == "revbifpn_s0" and not reversible
        return tiny(**TWO_LEVELS, reversible=reversible)

    monkeypatch.setattr(command, "create_model", small)
    arguments = ["info", "--model", "revbifpn_s0", "--side", "64", "--dtype", "bf16", "--stored"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("torch", torch.__version__.split("+")[0], "resample_undo", "C++ (CPU)"):
        assert text in shown
    net = tiny(**TWO_LEVELS, reversible=False)
    assert "Training memory per image, bf16, stored activations" in shown
    name, side, parameters, multiply_adds, held, peak = shown.splitlines()[-1].split()
    assert (name, side) == ("revbifpn_s0", "64")
    assert parameters == f"{sum(p.numel() for p in net.parameters()):,}"
    assert multiply_adds == f"{macs(net, 64).official:,}"
    one, three = (
        training_memory(net, (n, 3, 64, 64), autocast=torch.bfloat16).held for n in (1, 3)
    )
    assert float(held) == pytest.approx((three - one) / 2 / MIB, abs=0.1)
    assert 0 < float(held) <= float(peak)


def test_info_refuses_sides_that_no_model_takes(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["info", "--side", "31"])
    assert "--side must be at least 32 pixels, got 31" in capsys.readouterr().err
