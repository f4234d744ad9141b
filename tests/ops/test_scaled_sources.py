"""Scales and shifts of the sources: a batch norm that the fusion applies as it reads them."""

from functools import partial

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    Case,
    over,
    over_grid_of_scaled,
    over_lattices,
    over_modes,
    over_spreads,
    random_factors,
    random_like,
    small_inputs,
    with_few_bits,
)
from helpers import assert_as_accurate, on_lattice, on_this_machine, same_bits

from revbifpn_kernels import resample_add, resample_add_, resample_undo
from revbifpn_kernels.ops.resample.add import _resample_add_out_cuda, resample_add_reference
from revbifpn_kernels.ops.resample.undo import resample_undo_reference

OPS = torch.ops.revbifpn


def scaled_inputs(case, dtypes="fp32-mixed", device="cpu"):
    x, sources = case.tensors(dtypes, device)
    return x, sources, *random_factors(x, len(sources))


def materialised(sources, scales, shifts):
    factors = zip(sources, scales, shifts, strict=True)
    return [source * a[:, :, None, None] + b[:, :, None, None] for source, a, b in factors]


def add_reference(x, sources, scales, shifts, **options):
    return resample_add_reference(x, sources, scales=scales, shifts=shifts, **options)


def undo_reference(y, grad, sources, scales, shifts, **options):
    return resample_undo_reference(y, grad, sources, scales=scales, shifts=shifts, **options)


@over_grid_of_scaled
def test_forward(backend, case, dtypes, mode):
    inputs = x, sources, *factors = scaled_inputs(case, dtypes, backend.device)
    y = backend.add(x, sources, -0.7, mode, None, *factors)
    assert_as_accurate(y, add_reference, *inputs, alpha=-0.7, mode=mode)


@over_grid_of_scaled
def test_undo(backend, case, dtypes, mode):
    y, sources, *factors = scaled_inputs(case, dtypes, backend.device)
    grad = random_like(y)
    results = backend.undo(y, grad, sources, 0.7, mode, None, *factors)
    options = {"alpha": 0.7, "mode": mode}
    assert_as_accurate(results, undo_reference, y, grad, sources, *factors, **options)


@over(["channels-last-slice", "mixed-kinds", "mixed-powers"],
      quick=["mixed-kinds"], slow=["channels-last-slice", "mixed-powers"])  # fmt: skip
def test_rows_that_all_samples_share(backend, case):
    """The bits of a row per sample; each scale and shift is shared or not by itself."""
    x, sources, scales, shifts = scaled_inputs(case, device=backend.device)
    planes = x.shape[:2]
    shared = [scale[:1].expand(planes) for scale in scales], [*shifts]
    shared[1][0] = shifts[0][:1].expand(planes)
    dense = [[factor.contiguous() for factor in factors] for factors in shared]
    grad, options = random_like(x), (0.7, "bilinear", None)
    assert same_bits(backend.add(x, sources, *options, *shared),
                     backend.add(x, sources, *options, *dense))  # fmt: skip
    assert same_bits(backend.undo(x, grad, sources, *options, *shared),
                     backend.undo(x, grad, sources, *options, *dense))  # fmt: skip


@over_modes
@over(["x2-x4-x8-unaligned", "mixed-powers", "channels-last"], slow=["mixed-powers"])
def test_nothing_but_the_sources_changes(backend, case, mode):
    """Where all sums are exact, scaled sources and their written values give the same bits."""
    x, sources = with_few_bits(case.tensors("fp32", backend.device))
    scales, shifts = with_few_bits(random_factors(x, len(sources)))
    y = backend.add(x, sources, 0.5, mode, None, scales, shifts)
    assert torch.equal(y, backend.add(x, materialised(sources, scales, shifts), 0.5, mode, None))
    assert not torch.equal(y, backend.add(x, sources, 0.5, mode, None))


@pytest.mark.parametrize("name", ["odd", "channels-last", "slice", "mixed-powers", "strided"])
def test_the_product_is_rounded_before_the_sum(name):
    """In C++ as in PyTorch, whatever the instruction set and the way the source is read."""
    x, sources, *factors = scaled_inputs(CASES[name], "fp32")
    if name == "mixed-powers":
        del sources[3], factors[0][3], factors[1][3]  # an area source is averaged first
    y = OPS.resample_add(x, sources, *factors, 0.7, "bilinear", None)
    assert same_bits(y, resample_add(x, materialised(sources, *factors), alpha=0.7))


@over_spreads
def test_undo_and_writes_in_place_have_the_bits_of_add(backend, case):
    x, sources, *factors = scaled_inputs(case, device=backend.device)
    y = backend.add(x, sources, -0.7, "bilinear", 2.0**-9, *factors)
    restored, grads = backend.undo(x, random_like(x), sources, 0.7, "bilinear", 2.0**-9, *factors)
    assert same_bits(restored, y)
    assert [grad.dtype for grad in grads] == [source.dtype for source in sources]
    backend.add_(x, sources, -0.7, "bilinear", 2.0**-9, *factors)
    assert same_bits(x, y)


@over(["even", "channels-last-slice", "mixed-kinds"], slow=["even"])
def test_out(backend, case):
    x, sources, *factors = scaled_inputs(case, device=backend.device)
    out = torch.full_like(x, torch.nan)
    op = (
        OPS.resample_add_out
        if backend is BACKENDS["cpp"]
        else on_this_machine(_resample_add_out_cuda)
    )
    op(x, sources, *factors, out, 0.7, "nearest", None)
    assert same_bits(out, backend.add(x, sources, 0.7, "nearest", None, *factors))


@over_lattices
def test_lattice_undo_restores_every_bit(backend, case, dtypes, lattice):
    x, sources, *factors = scaled_inputs(case, dtypes, backend.device)
    on_lattice(x, lattice)
    y = backend.add(x, sources, 0.7, "bilinear", lattice, *factors)
    assert not torch.equal(y, x)
    restored, _ = backend.undo(y, random_like(y), sources, 0.7, "bilinear", lattice, *factors)
    assert same_bits(restored, x)


def add_in_place(x, *args, **options):
    """`resample_add_` on a copy of x: autograd refuses writes to a leaf."""
    return resample_add_(x * 1.0, *args, **options)


over_adds = pytest.mark.parametrize("op", [resample_add, add_in_place])


def gradients(function, x, *lists_and_grad, **options):
    *lists, grad_y = lists_and_grad
    x, *leaves = (t.detach().requires_grad_() for t in (x, *sum(lists, [])))
    y = function(x, **split_in_three(leaves), **options)
    return torch.autograd.grad(y, [x, *leaves], grad_y)


@pytest.mark.parametrize(
    ("op", "layout", "dtypes"),
    [
        (resample_add, "channels-last", "fp64"),
        (resample_add, "contiguous", "fp32"),
        (add_in_place, "channels-last", "bf16"),
        (resample_add, "channels-last", "fp32-mixed"),
        (add_in_place, "contiguous", "fp32-mixed"),
    ],
)
def test_gradients(op, layout, dtypes):
    """Of every kind of source, on so many planes that no chance decides the largest error."""
    case = Case((2, 40, 8, 12), ((8, 12), (4, 6), (16, 24), (5, 7)), layout, layout)
    x, *lists = scaled_inputs(case, dtypes)
    inputs = x, *lists, random_like(x)
    reference = partial(gradients, resample_add_reference)
    assert_as_accurate(gradients(op, *inputs, alpha=0.7), reference, *inputs, alpha=0.7)


def split_in_three(tensors):
    third = len(tensors) // 3
    return {
        "sources": tensors[:third],
        "scales": tensors[third : 2 * third],
        "shifts": tensors[2 * third :],
    }


def small_scaled_inputs():
    x, *sources = small_inputs()
    factors = random_factors(x, len(sources))
    return x, *sources, *(factor.requires_grad_() for factor in sum(factors, []))


@pytest.mark.parametrize("op", [resample_add, pytest.param(add_in_place, marks=pytest.mark.slow)])
def test_gradcheck(op):
    def function(x, *tensors):
        return op(x, **split_in_three(tensors), alpha=0.7)

    assert torch.autograd.gradcheck(function, small_scaled_inputs())
    assert torch.autograd.gradgradcheck(function, small_scaled_inputs())


@pytest.mark.slow
def test_undo_gradcheck():
    def function(y, grad, *tensors):
        x, grads = resample_undo(y, grad, **split_in_three(tensors), alpha=0.7)
        return x, *grads

    y, *tensors = small_scaled_inputs()
    inputs = [y, torch.randn_like(y, requires_grad=True), *tensors]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@over_adds
@pytest.mark.parametrize("wanted", ["x", "sources", "scales", "shifts"])
def test_only_what_a_gradient_needs_is_saved(wanted, op):
    x, sources, scales, shifts = scaled_inputs(CASES["mixed-kinds"])
    tensors = {"x": [x], "sources": sources, "scales": scales, "shifts": shifts}
    for tensor in tensors[wanted]:
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x, sources, scales=scales, shifts=shifts)
    expected = {"sources": scales, "scales": sources}.get(wanted, [])
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


@pytest.mark.parametrize(
    ("name", "requires_grad"),
    [
        ("mixed-kinds", True),
        pytest.param("channels-last", False, marks=pytest.mark.slow),
        pytest.param("slice", True, marks=pytest.mark.slow),
        pytest.param("empty-batch", True, marks=pytest.mark.slow),
    ],
)
def test_opcheck(name, requires_grad):
    x, *lists = scaled_inputs(CASES[name])
    options = 0.5, "bilinear", None
    torch.library.opcheck(OPS.resample_undo.default, (x, random_like(x), *lists, *options))
    for tensor in (x, *sum(lists, [])):
        tensor.requires_grad_(requires_grad)
    torch.library.opcheck(OPS.resample_add.default, (x, *lists, *options))
    torch.library.opcheck(OPS.resample_add_.default, (x.detach().clone(), *lists, *options))


@pytest.mark.parametrize("dynamic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_gradients(dynamic):
    def function(x, **lists):
        y = resample_add_(resample_add(x, **lists) * 2.0, **lists, alpha=0.7)
        return y + resample_undo(x, y, **lists)[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = *scaled_inputs(CASES["mixed-kinds"]), torch.randn(2, 3, 8, 12)
    assert same_bits(gradients(compiled, *inputs), gradients(function, *inputs))
