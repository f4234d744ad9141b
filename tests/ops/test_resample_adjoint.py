"""resample_adjoint: values against autograd of F.interpolate, layouts, the adjoint identity."""

import pytest
import torch
from cases import (
    BACKENDS,
    EMULATED,
    LAYOUTS,
    over,
    over_backends,
    over_grid,
    over_modes,
    random_maps,
    with_few_bits,
)
from helpers import assert_as_accurate, same_bits

from revbifpn_kernels.ops.resample.adjoint import resample_adjoint_reference

# Every kind of resampling of (H, W) = (8, 12) and, last, one that shrinks in one axis only.
SIZES = [(8, 12), (4, 6), (2, 3), (1, 1), (5, 7), (16, 24), (8, 5)]
over_backends_in_depth = pytest.mark.parametrize(
    "backend", [BACKENDS["cpp"], pytest.param(BACKENDS["triton"], marks=EMULATED)], ids=BACKENDS
)


@over_grid
def test_adjoint(backend, case, dtypes, mode):
    grad, sources = case.tensors(dtypes, backend.device)
    dtype, sizes = sources[0].dtype, case.sizes
    results = backend.adjoint(grad, sizes, -0.7, mode, dtype)
    options = {"alpha": -0.7, "mode": mode, "dtype": dtype}
    assert_as_accurate(results, resample_adjoint_reference, grad, sizes, **options)


@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.5e3])
def test_alpha_scales_every_result(alpha):
    grad = random_maps((2, 3, 8, 12))
    results = BACKENDS["cpp"].adjoint(grad, SIZES, alpha, "bilinear", torch.float32)
    assert_as_accurate(results, resample_adjoint_reference, grad, SIZES, alpha=alpha)


@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    [
        *(("cpp", layout, mode) for layout in LAYOUTS for mode in ("bilinear", "nearest")),
        pytest.param("triton", "channels-last-slice", "bilinear", marks=EMULATED),
        pytest.param("triton", "strided", "nearest", marks=EMULATED),
    ],
)
def test_layouts_do_not_change_a_bit(name, layout, mode):
    backend = BACKENDS[name]
    grad = random_maps((2, 5, 8, 12), layout=layout, device=backend.device)
    results = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    expected = backend.adjoint(grad.contiguous(), SIZES, 1.0, mode, torch.float32)
    assert same_bits(results, expected)


@over_backends
def test_results_are_new_and_channels_last_where_grad_is(backend):
    for layout in ("channels-last", "channels-last-slice"):
        grad = random_maps((2, 3, 8, 12), layout=layout, device=backend.device)
        results = backend.adjoint(grad, [(8, 12), (8, 12), (16, 12)], 1.0, "bilinear", grad.dtype)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results)
        assert len({t.data_ptr() for t in (grad, *results)}) == 4


@over_modes
def test_results_do_not_depend_on_their_neighbours(mode):
    """In C++; a Triton launch orders its sums by the finest result."""
    backend = BACKENDS["cpp"]
    grad = random_maps((2, 3, 8, 12))
    together = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    alone = [backend.adjoint(grad, [size], 1.0, mode, torch.float32)[0] for size in SIZES]
    assert same_bits(together, alone)


@over_modes
@over(["even", "x2-x4-x8", "mixed-powers"], slow=["x2-x4-x8", "mixed-powers"])
def test_identity_with_resample_add_is_exact(backend, case, mode):
    """<R s, g> = <s, Rᵀ g>: with few bits and dyadic weights both sides are exact in float64."""
    x, sources = with_few_bits(case.tensors("fp32", backend.device))
    results = backend.adjoint(x, case.sizes, 1.0, mode, torch.float32)
    for source, result in zip(sources, results, strict=True):
        resampled = backend.add(torch.zeros_like(x), [source], 1.0, mode, None)
        left = (resampled.double() * x.double()).sum()
        assert left == (source.double() * result.double()).sum()


@pytest.mark.parametrize("mode", ["bilinear"])
@over_backends
def test_a_constant_gradient_is_shared_out_whole(backend, mode):
    """Every row of R sums to one, so Rᵀ keeps the sum of the gradient."""
    grad = torch.ones((1, 1, 16, 32), device=backend.device)
    for result in backend.adjoint(grad, [(8, 16), (4, 8), (32, 64)], 1.0, mode, torch.float32):
        assert result.sum().item() == grad.numel()


def spiked(grad, places, sizes, mode):
    """`grad` with spikes that are not finite, and the weight of the spikes in every result."""
    spikes = torch.zeros(grad.shape)
    for place, spike in zip(places, (torch.nan, torch.inf), strict=True):
        grad[place], spikes[place] = spike, 1.0
    return grad, resample_adjoint_reference(spikes, sizes, mode=mode)


@over_modes
@over_backends_in_depth
def test_nan_and_inf_reach_what_they_have_weight_in(backend, mode):
    grad = random_maps((1, 1, 8, 12), device=backend.device)
    grad, weights = spiked(grad, [(0, 0, 3, 4), (0, 0, 6, 9)], SIZES, mode)
    results = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    for result, weight in zip(results, weights, strict=True):
        assert torch.equal(~result.isfinite().cpu(), weight != 0)


@pytest.mark.parametrize("places", [[(0, 0, 3, 15), (1, 1, 0, 0)], [(0, 1, 0, 0), (1, 0, 7, 15)]])
@over_backends
def test_nan_and_inf_do_not_cross_the_ends_of_rows(backend, places):
    """Where lanes exchange sums, the lane beside may hold another row or plane."""
    sizes = [(4, 8), (2, 4), (1, 2)]
    grad = random_maps((2, 2, 8, 16), device=backend.device)
    grad, weights = spiked(grad, places, sizes, "bilinear")
    results = backend.adjoint(grad, sizes, 1.0, "bilinear", torch.float32)
    for result, weight in zip(results, weights, strict=True):
        assert torch.equal(~result.isfinite().cpu(), weight != 0)
