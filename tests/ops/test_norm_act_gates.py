"""Squeeze-excite's gates and means of a normed and activated map in one call."""

import pytest
import torch
from cases import EMULATED
from helpers import assert_as_accurate, leaves_alone, on_this_machine, same_bits
from norm_act_cases import BACKENDS as NORM_BACKENDS
from norm_act_cases import CASES, Case, several_images  # noqa: F401 (a fixture)

from revbifpn_kernels.ops.norm_act.forward import norm_act_reference
from revbifpn_kernels.ops.squeeze_excite import image
from revbifpn_kernels.ops.squeeze_excite.gates import squeeze_excite_gates_reference
from revbifpn_kernels.ops.squeeze_excite.norm_act_gates import norm_act_gates_cuda

OP = torch.ops.revbifpn.norm_act_gates
OPS = {"cpp": OP, "triton": on_this_machine(norm_act_gates_cuda)}
ACTS = "hardswish", "silu"


def arguments(case, dtypes="fp32", device="cpu", hidden=6):
    """Those of `norm_act_gates`, without the activations."""
    inputs = case.inputs(dtypes, device)
    channels = inputs.x.shape[1]
    shapes = (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)
    network = [torch.randn(shape, dtype=inputs.mean.dtype, device=device) for shape in shapes]
    return *inputs.norm, *network


def reference(x, mean, invstd, weight, bias, *network):
    y = norm_act_reference(x.to(mean.dtype), mean, invstd, weight, bias, None, ACTS[0])
    means = y.mean((2, 3))
    return squeeze_excite_gates_reference(means, *network, ACTS[1]), means


@pytest.mark.parametrize(
    ("name", "case", "dtypes"),
    [
        *(("cpp", case, "fp32") for case in ("odd", "channels-last-slice", "cropped")),
        *(("triton", case, "fp32") for case in ("odd", "channels-last-slice")),
        ("triton", "programs-share-planes", "fp32"),
        pytest.param("triton", "cropped", "fp32", marks=EMULATED),
        pytest.param("triton", "many-images", "fp32", marks=EMULATED),
        pytest.param("triton", "small-maps", "bf16", marks=EMULATED),
    ],
)
def test_as_accurate_as_the_reference(name, case, dtypes):
    given = arguments(CASES[case], dtypes, NORM_BACKENDS[name].device)
    assert_as_accurate(leaves_alone(OPS[name])(*given, *ACTS), reference, *given)


@pytest.mark.usefixtures("several_images")
def test_programs_of_several_images_triton():
    given = arguments(CASES["many-images"], device=NORM_BACKENDS["triton"].device)
    assert_as_accurate(OPS["triton"](*given, *ACTS), reference, *given)


@pytest.mark.parametrize("hidden", [1, 16, pytest.param(33, marks=EMULATED)])
def test_any_number_of_hidden_units_triton(hidden):
    given = arguments(CASES["odd"], hidden=hidden, device=NORM_BACKENDS["triton"].device)
    assert_as_accurate(OPS["triton"](*given, *ACTS), reference, *given)


def test_large_networks_take_launches_of_their_own_triton(monkeypatch):
    given = arguments(CASES["odd"], device=NORM_BACKENDS["triton"].device)
    gates, means = OPS["triton"](*given, *ACTS)
    monkeypatch.setattr(image, "SMALL_BYTES", 0)
    larger = OPS["triton"](*given, *ACTS)
    assert same_bits(means, larger[1])
    torch.testing.assert_close(gates, larger[0])


def test_opcheck():
    torch.library.opcheck(OP.default, (*arguments(CASES["odd"]), *ACTS))


@pytest.mark.parametrize("name", OPS)
def test_empty_batch(name):
    given = arguments(Case((0, 5, 4, 4)), device=NORM_BACKENDS[name].device)
    assert all(values.shape == (0, 5) for values in OPS[name](*given, *ACTS))


def test_errors():
    given = [values.to("meta") for values in arguments(CASES["odd"])]
    with pytest.raises(ValueError, match="norm_act_gates: reduce_weight must have"):
        OP(*given[:5], given[5][:, 1:], *given[6:], *ACTS)
    with pytest.raises(ValueError, match="norm_act_gates: invstd must have"):
        OP(*given[:2], given[2][1:], *given[3:], *ACTS)
