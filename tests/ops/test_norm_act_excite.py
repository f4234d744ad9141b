"""The gradient of a stage with squeeze-excite in one call."""

import pytest
import torch
from cases import EMULATED
from helpers import assert_as_accurate, leaves_alone, on_this_machine, same_bits
from norm_act_cases import BACKENDS as NORM_BACKENDS
from norm_act_cases import CASES, several_images  # noqa: F401 (a fixture)

from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_reference
from revbifpn_kernels.ops.norm_act.sums import OF_GATES, norm_act_sums_reference
from revbifpn_kernels.ops.squeeze_excite import image
from revbifpn_kernels.ops.squeeze_excite.gates import (
    squeeze_excite_gates_backward_cuda,
    squeeze_excite_gates_backward_reference,
    squeeze_excite_gates_reference,
)
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad_cuda

HIDDEN = 6
ACTS = "hardswish", "silu"
LAUNCHERS = {
    "norm_act_excite_grad": on_this_machine(norm_act_excite_grad_cuda),
    "squeeze_excite_gates_backward": on_this_machine(squeeze_excite_gates_backward_cuda),
}
OPS = {"cpp": lambda name: getattr(torch.ops.revbifpn, name), "triton": LAUNCHERS.__getitem__}


def arguments(case, device="cpu", dtypes="fp32"):
    """Those of `norm_act_excite_grad`, without the names of activations and `is_batch`."""
    inputs = case.inputs(dtypes, device)
    channels = inputs.x.shape[1]
    shapes = (HIDDEN, channels, 1, 1), (HIDDEN,), (channels, HIDDEN, 1, 1), (channels,)
    network = [torch.randn(shape, dtype=inputs.mean.dtype, device=device) for shape in shapes]
    means = inputs.grad_means.sigmoid()
    gate = squeeze_excite_gates_reference(means, *network, ACTS[1])
    return inputs.grad, *inputs.norm, gate, means, *network


def reference(grad, x, mean, invstd, weight, bias, gate, means, *network, is_batch=True):
    norm = grad, x, mean, invstd, weight, bias
    of_gates = norm_act_sums_reference(*norm, ACTS[0], True)[OF_GATES]
    of_means, *grads = squeeze_excite_gates_backward_reference(
        of_gates, means, *network, act=ACTS[1]
    )
    gates = gate, of_means
    return *norm_act_grad_reference(*norm, *gates, act=ACTS[0], is_batch=is_batch), *grads


@pytest.mark.parametrize(
    ("backend", "case", "dtypes"),
    [
        ("cpp", "odd", "fp32"),
        ("triton", "odd", "fp32"),
        ("triton", "channels-last-aligned", "bf16"),
        ("triton", "programs-share-planes", "fp32"),
        pytest.param("triton", "cropped", "fp32", marks=EMULATED),
        pytest.param("triton", "many-images", "fp32", marks=EMULATED),
        pytest.param("triton", "small-maps", "bf16", marks=EMULATED),
    ],
)
def test_as_accurate_as_the_reference(backend, case, dtypes):
    given = arguments(CASES[case], NORM_BACKENDS[backend].device, dtypes)
    ours = leaves_alone(OPS[backend]("norm_act_excite_grad"))(*given, *ACTS, True)
    assert_as_accurate(ours, reference, *given)


@pytest.mark.usefixtures("several_images")
def test_programs_of_several_images_triton():
    given = arguments(CASES["many-images"], NORM_BACKENDS["triton"].device)
    ours = OPS["triton"]("norm_act_excite_grad")(*given, *ACTS, True)
    assert_as_accurate(ours, reference, *given)


@pytest.mark.parametrize("backend", OPS)
@pytest.mark.parametrize(
    ("case", "is_batch"),
    [("odd", True), pytest.param("channels-last-slice", False, marks=pytest.mark.slow)],
)
def test_equals_its_parts(backend, case, is_batch, monkeypatch):
    """On GPUs where the network is large."""
    monkeypatch.setattr(image, "SMALL_BYTES", 0)
    norm, find = NORM_BACKENDS[backend], OPS[backend]
    given = arguments(CASES[case], norm.device)
    grad_and_norm, gate, means, network = given[:6], given[6], given[7], given[8:]
    ours = find("norm_act_excite_grad")(*given, *ACTS, is_batch)
    sums = norm.norm_act_sums(*grad_and_norm, ACTS[0], True)
    grad_means, *of_network = find("squeeze_excite_gates_backward")(
        sums[OF_GATES], means, *network, ACTS[1]
    )
    expected = norm.norm_act_grad(*grad_and_norm, gate, grad_means, sums, ACTS[0], is_batch)
    assert len(ours) == 7
    assert all(map(same_bits, ours, (*expected, *of_network)))


def test_opcheck():
    op = torch.ops.revbifpn.norm_act_excite_grad.default
    torch.library.opcheck(op, (*arguments(CASES["odd"]), "hardswish", "relu", True))


@pytest.mark.parametrize(
    "position, change, message",
    [
        (0, lambda t: t[:, 1:], "grad must have x's"),
        (6, lambda t: t[:, 1:], "gate must have"),
        (7, lambda t: t.double(), "means must have"),
        (8, lambda t: t[:, 1:], "reduce_weight must have"),
    ],
)
def test_errors(position, change, message):
    given = [t.to("meta") for t in arguments(CASES["odd"])]
    given[position] = change(given[position])
    with pytest.raises(ValueError, match=f"norm_act_excite_grad: {message}"):
        torch.ops.revbifpn.norm_act_excite_grad(*given, "hardswish", "relu", True)
