"""The norm_act family: each op against its reference, and the gradient of a squeeze-excite."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import as_dtype, assert_as_accurate, same_bits
from norm_act_cases import BACKENDS, CASES, EMULATED, EPS, Case, over_backends, over_grid

from revbifpn_kernels.ops.norm_act import tiles
from revbifpn_kernels.ops.norm_act.arguments import ACTIVATIONS
from revbifpn_kernels.ops.norm_act.forward import norm_act_reference
from revbifpn_kernels.ops.norm_act.gradient import (
    norm_act_grad_reference,
    norm_act_input_grad_reference,
)
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_reference
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums_reference

over_acts = pytest.mark.parametrize("act", ACTIVATIONS)


def means_reference(x, mean, *factors, act):
    return norm_act_reference(x.to(mean.dtype), mean, *factors, act=act).mean((2, 3))


def running_reference(x, mean, var, momentum):
    """The running statistics after F.batch_norm."""
    mean, var = mean.clone(), var.clone()
    F.batch_norm(x.to(mean.dtype), mean, var, training=True, momentum=momentum, eps=EPS)
    return mean, var


def check_grad(backend, inputs, gate, grad_means, act, is_batch=True):
    """`norm_act_grad` from sums that are exact but for their last rounding."""
    arguments = inputs.grad, *inputs.norm
    exact = as_dtype(arguments, torch.float64)
    sums = norm_act_sums_reference(*exact, act=act, gated=grad_means is not None)
    sums = sums.to(inputs.mean)
    results = backend.norm_act_grad(*arguments, gate, grad_means, sums, act, is_batch)
    options = {"act": act, "is_batch": is_batch}
    assert_as_accurate(results, norm_act_grad_reference, *arguments, gate, grad_means, **options)
    return results


@over_grid
def test_statistics(backend, case, dtypes):
    x = case.inputs(dtypes, backend.device).x
    assert_as_accurate(backend.batch_statistics(x), batch_statistics_reference, x, eps=EPS)


@over_grid
def test_norm_act(backend, case, dtypes):
    inputs = case.inputs(dtypes, backend.device)
    y = backend.norm_act(*inputs.norm, inputs.gate, "hardswish")
    assert_as_accurate(y, norm_act_reference, *inputs.norm, inputs.gate, act="hardswish")
    assert y.stride() == torch.empty_like(inputs.x).stride()


@over_grid
def test_means(backend, case, dtypes):
    inputs = case.inputs(dtypes, backend.device)
    means = backend.norm_act_means(*inputs.norm, "hardswish")
    assert_as_accurate(means, means_reference, *inputs.norm, act="hardswish")


@over_grid
def test_sums(backend, case, dtypes):
    inputs = case.inputs(dtypes, backend.device)
    arguments, options = (inputs.grad, *inputs.norm), {"act": "hardswish", "gated": True}
    sums = backend.norm_act_sums(*arguments, "hardswish", True)
    assert_as_accurate(sums.unbind(), sums_apart, *arguments, **options)


def sums_apart(*arguments, **options):
    """The reference's sums one by one: the largest would excuse errors of the others."""
    return norm_act_sums_reference(*arguments, **options).unbind()


@over_grid
def test_input_grad(backend, case, dtypes):
    inputs = case.inputs(dtypes, backend.device)
    means = torch.randn_like(inputs.mean), torch.randn_like(inputs.mean)
    arguments = (inputs.grad, *inputs.norm, inputs.gate, inputs.grad_means, *means)
    dx = backend.norm_act_input_grad(*arguments, "hardswish")
    assert_as_accurate(dx, norm_act_input_grad_reference, *arguments, act="hardswish")
    assert dx.stride() == torch.empty_like(inputs.x).stride()


@over_backends
def test_input_grad_from_the_batch_s_own_sums_is_its_gradient(backend):
    inputs = CASES["odd"].inputs(device=backend.device)
    N, C, H, W = inputs.x.shape
    grad = inputs.grad, *inputs.norm
    expected, *sums = backend.norm_act_grad(*grad, None, None, None, "silu", True)
    means = (total / (N * H * W) for total in sums)
    dx = backend.norm_act_input_grad(*grad, None, None, *means, "silu")
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)


@over_grid
def test_grad(backend, case, dtypes):
    inputs = case.inputs(dtypes, backend.device)
    dx, _, _ = check_grad(backend, inputs, inputs.gate, inputs.grad_means, "hardswish")
    assert dx.stride() == torch.empty_like(inputs.x).stride()


@over_grid
def test_grad_from_maps_alone(backend, case, dtypes):
    """As for a norm that stochastic depth follows."""
    inputs = case.inputs(dtypes, backend.device)
    given = inputs.grad, *inputs.norm, inputs.gate, None
    results = backend.norm_act_grad(*given, None, "hardswish", True)
    assert_as_accurate(results, norm_act_grad_reference, *given, act="hardswish")


# act, gated, affine, is_batch, case: in C++ all but the last are a product.
TRIALS = [
    *(
        ("cpp", act, gated, affine, is_batch, case)
        for act in ACTIVATIONS
        for gated, affine, is_batch in itertools.product((True, False), repeat=3)
        for case in (("odd", "channels-last-aligned")[affine ^ gated ^ is_batch],)
    ),
    ("triton", "identity", True, False, False, "odd"),
    ("triton", "relu", False, True, True, "channels-last-aligned"),
    ("triton", "silu", True, True, False, "odd"),
    ("triton", "hardswish", False, False, True, "odd"),
    pytest.param("triton", "silu", False, False, True, "channels-last-aligned", marks=EMULATED),
    pytest.param("triton", "relu", True, True, False, "odd", marks=EMULATED),
]


@pytest.mark.parametrize(("name", "act", "gated", "affine", "is_batch", "case"), TRIALS)
def test_acts_gates_and_factors(name, act, gated, affine, is_batch, case):
    backend = BACKENDS[name]
    inputs = CASES[case].inputs(device=backend.device, affine=affine)
    gate, grad_means = (inputs.gate, inputs.grad_means) if gated else (None, None)
    y = backend.norm_act(*inputs.norm, gate, act)
    assert_as_accurate(y, norm_act_reference, *inputs.norm, gate, act=act)
    means = backend.norm_act_means(*inputs.norm, act)
    assert_as_accurate(means, means_reference, *inputs.norm, act=act)
    arguments = inputs.grad, *inputs.norm
    sums = backend.norm_act_sums(*arguments, act, gated)
    assert_as_accurate(sums.unbind(), sums_apart, *arguments, act=act, gated=gated)
    check_grad(backend, inputs, gate, grad_means, act, is_batch)


@over_backends
def test_sums_that_are_not_given_are_taken(backend):
    inputs = CASES["odd"].inputs(device=backend.device)
    arguments = inputs.grad, *inputs.norm
    sums = backend.norm_act_sums(*arguments, "hardswish", True)
    ours, expected = (
        backend.norm_act_grad(*arguments, inputs.gate, inputs.grad_means, given, "hardswish", True)
        for given in (None, sums)
    )
    assert same_bits(ours, expected)


@over_acts
@over_backends
def test_slopes_at_the_kinks_are_pytorchs(backend, act):
    """Exactly: the factors are 1, so z is x."""
    x = torch.tensor([-3.0, 3.0, 0.0, -4.0, 4.0, -2.9990234, 2.9990234, -0.5])
    x = x.reshape(1, 8, 1, 1).to(backend.device)
    mean, one = torch.zeros(8, device=x.device), torch.ones(8, device=x.device)
    y = backend.norm_act(x, mean, one, None, None, None, act)
    sums = backend.norm_act_sums(one.reshape(x.shape), x, mean, one, None, None, act, False)
    assert_as_accurate(y, lambda x: ACTIVATIONS[act](x), x)
    expected = norm_act_sums_reference(one.reshape(x.shape), x, mean, one, act=act)
    torch.testing.assert_close(sums, expected, rtol=0, atol=2**-22)


@over_backends
@pytest.mark.parametrize("name", ["odd", "channels-last"])
def test_running_statistics_move_as_pytorchs(backend, name):
    x = CASES[name].inputs(device=backend.device).x
    C = x.shape[1]
    before = torch.randn(C, device=x.device), torch.rand(C, device=x.device)
    running, batches = [values.clone() for values in before], torch.tensor(5, device=x.device)
    results = backend.batch_statistics(x, (*running, batches), 0.3)
    assert_as_accurate(running, lambda *a, **k: list(running_reference(*a, **k)), x, *before,
                       momentum=0.3)  # fmt: skip
    assert batches.item() == 6 and batches.dtype == torch.int64
    assert same_bits(results, backend.batch_statistics(x))


@over_backends
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels-last", marks=EMULATED)])
def test_statistics_do_not_cancel(backend, layout):
    """The mean is a thousand deviations off; or the first rows are, which programs see first."""
    case = Case((2, 16, 16, 40), layout)
    x = case.maps(torch.float32, backend.device, offset=1000.0)
    assert_as_accurate(backend.batch_statistics(x), batch_statistics_reference, x, eps=EPS)
    x[:, :, :7] -= 1000.0
    assert_as_accurate(backend.batch_statistics(x), batch_statistics_reference, x, eps=EPS)


@pytest.fixture
def programs(request, monkeypatch):
    """Cuts planned for a GPU so small that programs walk through many images and tiles."""
    monkeypatch.setattr(tiles, "PROGRAMS", request.param)
    tiles._plan.cache_clear()
    yield request.param
    tiles._plan.cache_clear()


IMAGES, TILES = (7, 20, 5, 5), (2, 16, 16, 31)


@pytest.mark.parametrize(
    ("programs", "layout", "shape"),
    [
        (3, "contiguous", IMAGES),
        (5, "channels-last", TILES),
        pytest.param(1, "channels-last", TILES, marks=EMULATED),
        pytest.param(5, "contiguous", TILES, marks=EMULATED),
        pytest.param(5, "channels-last", IMAGES, marks=EMULATED),
    ],
    indirect=["programs"],
)
def test_any_cut_among_programs_is_right_triton(programs, shape, layout):
    backend = BACKENDS["triton"]
    inputs = Case(shape, layout).inputs(device=backend.device)
    results = backend.batch_statistics(inputs.x)
    assert_as_accurate(results, batch_statistics_reference, inputs.x, eps=EPS)
    y = backend.norm_act(*inputs.norm, inputs.gate, "silu")
    assert_as_accurate(y, norm_act_reference, *inputs.norm, inputs.gate, act="silu")
    means = backend.norm_act_means(*inputs.norm, "silu")
    assert_as_accurate(means, means_reference, *inputs.norm, act="silu")
    arguments = inputs.grad, *inputs.norm
    for gated in (True, False):
        sums = backend.norm_act_sums(*arguments, "silu", gated)
        assert_as_accurate(sums.unbind(), sums_apart, *arguments, act="silu", gated=gated)
    check_grad(backend, inputs, inputs.gate, inputs.grad_means, "silu")


SQUEEZE_EXCITED = (("cpp", "fp32"), ("cpp", "fp64"), ("triton", "fp32"))


def squeeze_excite(x, weight, bias, mix):
    """act(batch norm(x)), gated by its own means."""
    y = F.silu(F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))
    return y * (y.mean((2, 3)) @ mix).sigmoid()[:, :, None, None]


def squeeze_excite_gradients(x, grad, weight, bias, mix):
    leaves = [values.detach().requires_grad_() for values in (x, weight, bias, mix)]
    with torch.enable_grad():
        return torch.autograd.grad(squeeze_excite(*leaves), leaves, grad)


@pytest.mark.parametrize("name", ["channels-last"])
@pytest.mark.parametrize(
    ("backend", "dtypes"),
    [(BACKENDS[name], dtypes) for name, dtypes in SQUEEZE_EXCITED],
    ids=map("-".join, SQUEEZE_EXCITED),
)
def test_squeeze_excite_has_the_gradient_of_autograd(backend, name, dtypes):
    inputs = CASES[name].inputs(dtypes, backend.device)
    x, grad, weight, bias = inputs.x, inputs.grad, inputs.weight, inputs.bias
    mix = torch.randn(2 * [x.shape[1]], dtype=torch.float64).to(weight)
    factors = *backend.batch_statistics(x), weight, bias
    means = backend.norm_act_means(x, *factors, "silu").requires_grad_()
    leaf = mix.clone().requires_grad_()
    gate = (means @ leaf).sigmoid()
    sums = backend.norm_act_sums(grad, x, *factors, "silu", True)
    grad_means, dmix = torch.autograd.grad(gate, [means, leaf], sums[4])
    gate = gate.detach()
    results = backend.norm_act_grad(grad, x, *factors, gate, grad_means, sums, "silu", True)
    ours, arguments = (*results, dmix), (x, grad, weight, bias, mix)
    if dtypes == "fp64":  # autograd's own rounding is no measure of a chain of ops
        torch.testing.assert_close(ours, squeeze_excite_gradients(*arguments))
    else:
        assert_as_accurate(ours, squeeze_excite_gradients, *arguments)
