"""The gradient of a stage with squeeze-excite in one call."""

import pytest
import torch
from helpers import on_this_machine, same_bits
from norm_act_cases import BACKENDS as NORM_BACKENDS
from norm_act_cases import CASES

from revbifpn_kernels.ops.norm_act.sums import OF_GATES
from revbifpn_kernels.ops.squeeze_excite.gates import squeeze_excite_gates_backward_cuda
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad_cuda

HIDDEN = 6
LAUNCHERS = {
    "norm_act_excite_grad": on_this_machine(norm_act_excite_grad_cuda),
    "squeeze_excite_gates_backward": on_this_machine(squeeze_excite_gates_backward_cuda),
}
OPS = {"cpp": lambda name: getattr(torch.ops.revbifpn, name), "triton": LAUNCHERS.__getitem__}


def arguments(case, device="cpu", dtypes="fp32"):
    """Those of `norm_act_excite_grad`, without the names of activations and `is_batch`."""
    inputs = CASES[case].inputs(dtypes, device)
    channels = inputs.x.shape[1]
    shapes = (HIDDEN, channels, 1, 1), (HIDDEN,), (channels, HIDDEN, 1, 1), (channels,)
    network = [torch.randn(shape, dtype=inputs.mean.dtype, device=device) for shape in shapes]
    return inputs.grad, *inputs.norm, inputs.gate, inputs.grad_means.sigmoid(), *network


@pytest.mark.parametrize("backend", OPS)
@pytest.mark.parametrize(
    ("case", "is_batch"),
    [("odd", True), pytest.param("channels-last-slice", False, marks=pytest.mark.slow)],
)
def test_equals_its_parts(backend, case, is_batch):
    norm, find = NORM_BACKENDS[backend], OPS[backend]
    given = arguments(case, norm.device)
    grad_and_norm, gate, means, network = given[:6], given[6], given[7], given[8:]
    acts = "hardswish", "silu"
    ours = find("norm_act_excite_grad")(*given, *acts, is_batch)
    sums = norm.norm_act_sums(*grad_and_norm, acts[0], True)
    grad_means, *of_network = find("squeeze_excite_gates_backward")(
        sums[OF_GATES], means, *network, acts[1]
    )
    expected = norm.norm_act_grad(*grad_and_norm, gate, grad_means, sums, acts[0], is_batch)
    assert len(ours) == 7
    assert all(map(same_bits, ours, (*expected, *of_network)))


def test_opcheck():
    op = torch.ops.revbifpn.norm_act_excite_grad.default
    torch.library.opcheck(op, (*arguments("odd"), "hardswish", "relu", True))


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
    given = [t.to("meta") for t in arguments("odd")]
    given[position] = change(given[position])
    with pytest.raises(ValueError, match=f"norm_act_excite_grad: {message}"):
        torch.ops.revbifpn.norm_act_excite_grad(*given, "hardswish", "relu", True)
