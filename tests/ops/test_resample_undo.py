"""resample_undo: the inverse and the adjoint together, and the lattice over a deep chain."""

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    EMULATED,
    LAYOUTS,
    Case,
    over,
    over_backends,
    over_cpp_spreads,
    over_grid_of_undo,
    over_lattices,
    over_modes,
    over_spreads,
    random_like,
    random_maps,
)
from helpers import assert_as_accurate, on_lattice, same_bits

from revbifpn_kernels.ops import tiling
from revbifpn_kernels.ops.resample import add, undo
from revbifpn_kernels.ops.resample.undo import resample_undo_reference


@over_grid_of_undo
def test_undo(backend, case, dtypes, mode):
    y, sources = case.tensors(dtypes, backend.device)
    grad = LAYOUTS[case.x_layout](random_like(y))
    results = backend.undo(y, grad, sources, -0.7, mode, None)
    options = {"alpha": -0.7, "mode": mode}
    assert_as_accurate(results, resample_undo_reference, y, grad, sources, **options)


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.5e3])
@over(["mixed-kinds", "x2-x4-x8"], slow=["x2-x4-x8"])
def test_alpha_scales_both(backend, case, alpha):
    y, sources = case.tensors("fp32-mixed", backend.device)
    grad = random_like(y)
    results = backend.undo(y, grad, sources, alpha, "bilinear", None)
    assert_as_accurate(results, resample_undo_reference, y, grad, sources, alpha=alpha)


@pytest.mark.parametrize(("mode", "lattice"), [("bilinear", 2.0**-6), ("nearest", None)])
@over_spreads
def test_undo_restores_the_bits_that_add_would(backend, case, mode, lattice):
    y, sources = case.tensors("fp32-mixed", backend.device)
    x, _ = backend.undo(y, random_like(y), sources, 0.7, mode, lattice)
    assert same_bits(x, backend.add(y, sources, -0.7, mode, lattice))


@over_modes
@over_cpp_spreads
def test_undo_has_the_gradients_of_adjoint(case, mode):
    """Bit for bit in C++; a Triton launch orders its sums by all sources that it has."""
    backend = BACKENDS["cpp"]
    y, sources = case.tensors("fp32-mixed")
    grad = random_like(y)
    _, grads = backend.undo(y, grad, sources, 0.7, mode, None)
    for source, grad_source in zip(sources, grads, strict=True):
        size = tuple(source.shape[2:])
        assert same_bits([grad_source], backend.adjoint(grad, [size], 0.7, mode, source.dtype))


DISTINCT = ("contiguous", "channels-last", "slice", "channels-last-slice", "strided")
# Layouts of the gradient, the sources and y: in C++ every pair.
LAYOUT_TRIPLES = (
    *(
        ("cpp", grad, DISTINCT[(k + j) % 5], y)
        for k, grad in enumerate(LAYOUTS)
        for j, y in enumerate(DISTINCT)
    ),
    pytest.param("triton", "slice", "contiguous", "channels-last", marks=EMULATED),
    pytest.param("triton", "expanded", "strided", "slice", marks=EMULATED),
)


@pytest.mark.parametrize(("name", "grad_layout", "source_layout", "y_layout"), LAYOUT_TRIPLES)
def test_layouts_do_not_change_a_bit(name, grad_layout, source_layout, y_layout):
    backend = BACKENDS[name]
    y, sources = CASES["mixed-kinds"].tensors("fp32", backend.device)
    grad = random_maps(y.shape, layout=grad_layout, device=backend.device)
    expected = backend.undo(y, grad.contiguous(), sources, 1.0, "bilinear", None)
    sources, laid_out = [LAYOUTS[source_layout](s) for s in sources], LAYOUTS[y_layout](y)
    x, grads = backend.undo(laid_out, grad, sources, 1.0, "bilinear", None)
    assert same_bits((x, grads), expected)
    assert x.stride() == torch.empty_like(laid_out).stride()


@over_lattices
def test_lattice_undo_restores_every_bit(backend, case, dtypes, lattice):
    x, sources = case.tensors(dtypes, backend.device)
    on_lattice(x, lattice)
    y = backend.add(x, sources, 0.7, "bilinear", lattice)
    restored, _ = backend.undo(y, random_like(y), sources, 0.7, "bilinear", lattice)
    assert same_bits(restored, x)


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU that few lanes fill, so that each lane walks down a chain of cells."""
    monkeypatch.setattr(tiling, "LANES_TO_FILL", 1)
    for op in (add, undo):
        op._plan.cache_clear()
    yield
    for op in (add, undo):
        op._plan.cache_clear()


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels-last", marks=EMULATED)])
def test_chains_of_cells_triton(small_gpu, layout):
    backend = BACKENDS["triton"]
    case = Case((1, 2, 24, 16), ((12, 8), (24, 16), (6, 4), (3, 2)), layout, layout)
    y, sources = case.tensors("fp32-mixed", backend.device)
    grad = random_like(y)
    arguments = sources, [], [], 0.7, "bilinear", None
    (launch, _), *_ = undo.plan_resample_undo(y, sources, y, grad, *arguments)
    assert launch.args["chain"] == add.plan_resample_add(y, y, *arguments)[0].args["chain"] == 3
    results = backend.undo(y, grad, sources, 0.7, "bilinear", None)
    assert_as_accurate(results, resample_undo_reference, y, grad, sources, alpha=0.7)
    assert same_bits(results[0], backend.add(y, sources, -0.7, "bilinear", None))


def coupling(fine, coarse, step):
    """The stream that the step-th coupling adds to, and its sources: any functions of the other."""
    if step % 2:
        return coarse, [torch.sin(fine * step)]
    return fine, [torch.cos(coarse + step), torch.tanh(coarse[..., :2, :3])]


def forward_and_back(backend, fine, coarse, couplings, lattice):
    """Couple the streams in turn, then undo it all from the last streams alone."""
    for step in range(couplings):
        target, sources = coupling(fine, coarse, step)
        backend.add_(target, sources, 1.0, "bilinear", lattice)
    for step in reversed(range(couplings)):
        target, sources = coupling(fine, coarse, step)
        restored, _ = backend.undo(target, target, sources, 1.0, "bilinear", lattice)
        target.copy_(restored)
    return fine, coarse


@over_backends
def test_lattice_restores_two_hundred_couplings(backend):
    couplings = 200 if backend is BACKENDS["cpp"] or backend.device == "cuda" else 4
    fine = on_lattice(random_maps((2, 2, 8, 12), device=backend.device), 2.0**-12)
    coarse = on_lattice(random_maps((2, 2, 4, 6), device=backend.device), 2.0**-12)
    streams = forward_and_back(backend, fine.clone(), coarse.clone(), couplings, 2.0**-12)
    assert same_bits(streams, (fine, coarse))
    if couplings == 200:
        drifted = forward_and_back(backend, fine.clone(), coarse.clone(), couplings, None)
        assert not same_bits(drifted, (fine, coarse)), "without a lattice the streams should drift"
