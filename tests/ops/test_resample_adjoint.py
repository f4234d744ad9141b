"""resample_adjoint: values against autograd of F.interpolate, layouts, the adjoint identity."""

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    LAYOUTS,
    over_backends,
    over_backends_in_depth,
    over_grid,
    over_modes,
    random_maps,
)
from helpers import assert_as_accurate, same_bits

from revbifpn_kernels.ops.resample.adjoint import resample_adjoint_reference

# Every kind of resampling of (H, W) = (8, 12) and, last, one that shrinks in one axis only.
SIZES = [(8, 12), (4, 6), (2, 3), (1, 1), (5, 7), (16, 24), (8, 5)]


@over_grid
def test_adjoint(backend, case, dtypes, mode):
    grad, sources = case.tensors(dtypes, backend.device)
    dtype = sources[0].dtype
    results = backend.adjoint(grad, case.sizes, 1.0, mode, dtype)
    assert_as_accurate(
        results, resample_adjoint_reference, grad, case.sizes, mode=mode, dtype=dtype
    )


@pytest.mark.parametrize("alpha", [-1.0, 0.3, 0.0, -2.5e3])
@over_backends_in_depth
def test_alpha_scales_every_result(backend, alpha):
    grad = random_maps((2, 3, 8, 12), device=backend.device)
    results = backend.adjoint(grad, SIZES, alpha, "bilinear", torch.float32)
    assert_as_accurate(results, resample_adjoint_reference, grad, SIZES, alpha=alpha)


@over_modes
@pytest.mark.parametrize("layout", LAYOUTS)
@over_backends_in_depth
def test_layouts_do_not_change_a_bit(backend, layout, mode):
    grad = random_maps((2, 5, 8, 12), layout=layout, device=backend.device)
    results = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    expected = backend.adjoint(grad.contiguous(), SIZES, 1.0, mode, torch.float32)
    assert same_bits(results, expected)


@over_backends
def test_results_are_channels_last_where_grad_is(backend):
    for layout in ("channels-last", "channels-last-slice"):
        grad = random_maps((2, 3, 8, 12), layout=layout, device=backend.device)
        for result in backend.adjoint(grad, [(4, 6), (16, 12)], 1.0, "bilinear", grad.dtype):
            assert result.is_contiguous(memory_format=torch.channels_last)


@over_modes
def test_results_do_not_depend_on_their_neighbours(mode):
    """In C++; a Triton launch orders its sums by the finest result."""
    backend = BACKENDS["cpp"]
    grad = random_maps((2, 3, 8, 12))
    together = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    alone = [backend.adjoint(grad, [size], 1.0, mode, torch.float32)[0] for size in SIZES]
    assert same_bits(together, alone)


@over_backends
def test_results_are_new_tensors(backend):
    grad = random_maps((2, 3, 8, 12), device=backend.device)
    first, second = backend.adjoint(grad, [(8, 12), (8, 12)], 1.0, "bilinear", torch.float32)
    assert len({grad.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3


@over_modes
@pytest.mark.parametrize("name", ["even", "x2-x4-x8", "mixed-powers"])
@over_backends_in_depth
def test_identity_with_resample_add_is_exact(backend, name, mode):
    """<R s, g> = <s, Rᵀ g>: with few bits and dyadic weights both sides are exact in float64."""
    case = CASES[name]
    x, sources = case.tensors("fp32", backend.device)
    sources = [(source * 4).round() for source in sources]
    grad = (x * 4).round()
    results = backend.adjoint(grad, case.sizes, 1.0, mode, torch.float32)
    for source, result in zip(sources, results, strict=True):
        resampled = backend.add(torch.zeros_like(x), [source], 1.0, mode, None)
        left = (resampled.double() * grad.double()).sum()
        assert left == (source.double() * result.double()).sum()


@over_modes
@over_backends
def test_a_constant_gradient_is_shared_out_whole(backend, mode):
    """Every row of R sums to one, so Rᵀ keeps the sum of the gradient."""
    grad = torch.ones((1, 1, 16, 32), device=backend.device)
    for result in backend.adjoint(grad, [(8, 16), (4, 8), (32, 64)], 1.0, mode, torch.float32):
        assert result.sum().item() == grad.numel()


@over_modes
@over_backends_in_depth
def test_nan_and_inf_reach_what_they_have_weight_in(backend, mode):
    grad = random_maps((1, 1, 8, 12), device=backend.device)
    grad[0, 0, 3, 4], grad[0, 0, 6, 9] = torch.nan, torch.inf
    results = backend.adjoint(grad, SIZES, 1.0, mode, torch.float32)
    spikes = torch.zeros_like(grad)
    for y, x in ((3, 4), (6, 9)):
        spikes[0, 0, y, x] = 1.0
    for result, weight in zip(
        results, resample_adjoint_reference(spikes, SIZES, mode=mode), strict=True
    ):
        assert torch.equal(~result.isfinite(), weight != 0)
