"""resample_add, resample_add_, resample_add_out: values, rounding, layouts, the lattice."""

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    EMULATED,
    LAYOUTS,
    over,
    over_backends,
    over_grid,
    over_lattices,
    over_modes,
    over_powers,
    over_spreads,
    random_like,
    random_maps,
    with_few_bits,
)
from helpers import (
    IS_INTERPRETED,
    as_dtype,
    assert_as_accurate,
    leaves_alone,
    on_cpu,
    on_lattice,
    on_this_machine,
    same_bits,
    whole_storage,
)

from revbifpn_kernels.ops.resample.add import (
    _resample_add_out_cuda,
    resample_add_out,
    resample_add_reference,
)

OUT_OPS = {
    "cpp": lambda *args: torch.ops.revbifpn.resample_add_out(*args),
    "triton": on_this_machine(_resample_add_out_cuda),
}
over_out_ops = pytest.mark.parametrize("name", OUT_OPS)


@over_grid
def test_values_and_the_same_bits_in_place(backend, case, dtypes, mode):
    x, sources = case.tensors(dtypes, backend.device)
    y = backend.add(x, sources, -0.7, mode, None)
    assert_as_accurate(y, resample_add_reference, x, sources, alpha=-0.7, mode=mode)
    before, old_x = whole_storage(x).clone(), x.clone()
    assert backend.add_(x, sources, -0.7, mode, None) is None
    assert same_bits(x, y)
    x.copy_(old_x)
    assert torch.equal(whole_storage(x), before), "memory around x was written to"


@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.5e3])
@over(["mixed-kinds", "x2-x4-x8"], slow=["mixed-kinds"])
def test_alpha_scales_the_sum(backend, case, alpha):
    x, sources = case.tensors("fp32-mixed", backend.device)
    y = backend.add(x, sources, alpha, "bilinear", None)
    assert_as_accurate(y, resample_add_reference, x, sources, alpha=alpha)


@over_spreads
def test_inverse_restores_x(backend, case):
    def round_trip(x, sources):
        return resample_add_reference(resample_add_reference(x, sources), sources, alpha=-1.0)

    x, sources = case.tensors("fp32", backend.device)
    y = backend.add(x, sources, 1.0, "bilinear", None)
    restored = backend.add(y, sources, -1.0, "bilinear", None)
    assert_as_accurate(restored, round_trip, x, sources)


@over_modes
@over_powers
def test_powers_of_two_are_exact(backend, case, mode):
    x, sources = with_few_bits(case.tensors("fp32", backend.device))
    y = backend.add(x, sources, 0.5, mode, None)
    assert torch.equal(y, resample_add_reference(x, sources, alpha=0.5, mode=mode))


@pytest.mark.parametrize("dtypes", ["bf16", "fp16"])
@over_powers
def test_half_precision_is_rounded_once(backend, case, dtypes):
    if backend is BACKENDS["triton"] and dtypes == "bf16" and IS_INTERPRETED:
        pytest.skip("Triton's interpreter cuts float32 off to bfloat16; GPUs round")
    x, sources = with_few_bits(case.tensors(dtypes, backend.device))
    y = backend.add(x, sources, 0.5, "bilinear", None)
    exact = resample_add_reference(*as_dtype((x, sources), torch.float64), alpha=0.5)
    assert torch.equal(y, exact.to(x.dtype))


# x's layout, the sources'.
LAYOUT_PAIRS = (
    *(("cpp", x, source) for x in LAYOUTS for source in LAYOUTS if x != "expanded"),
    ("triton", "channels-last", "strided"),
    ("triton", "transposed", "channels-last-slice"),
)


@pytest.mark.parametrize(("name", "x_layout", "source_layout"), LAYOUT_PAIRS)
def test_layouts_do_not_change_a_bit(name, x_layout, source_layout):
    backend = BACKENDS[name]
    x, sources = CASES["mixed-kinds"].tensors("fp32", backend.device)
    if source_layout == "expanded":
        sources = [LAYOUTS["expanded"](source) for source in sources]
    expected = backend.add(x, sources, 1.0, "bilinear", None)
    laid_out = LAYOUTS[x_layout](x)
    y = backend.add(laid_out, list(map(LAYOUTS[source_layout], sources)), 1.0, "bilinear", None)
    assert same_bits(y, expected)
    assert y.stride() == torch.empty_like(laid_out).stride()


@over_backends
def test_output_is_channels_last_where_x_is(backend):
    source = random_maps((2, 3, 4, 6), device=backend.device)
    for layout in ("channels-last", "channels-last-slice"):
        x = random_maps((2, 3, 8, 12), layout=layout, device=backend.device)
        y = backend.add(x, [source], 1.0, "bilinear", None)
        assert y.is_contiguous(memory_format=torch.channels_last)


@over_backends
def test_maps_without_channels_stay_empty(backend):
    x, *sources = (torch.empty(2, 0, h, h, device=backend.device) for h in (8, 4, 8, 16))
    grads = backend.adjoint(x, [(4, 4), (8, 8), (16, 16)], 1.0, "bilinear", x.dtype)
    assert [grad.shape for grad in grads] == [source.shape for source in sources]
    assert backend.add(x, sources, 1.0, "bilinear", None).shape == x.shape
    backend.add_(x, sources, 1.0, "bilinear", None)
    restored, grads = backend.undo(x, x, sources, 1.0, "bilinear", None)
    assert [restored.shape, *(grad.shape for grad in grads)] == [m.shape for m in (x, *sources)]


@over_backends
def test_a_source_may_come_twice_and_be_x(backend):
    x = random_maps((2, 3, 8, 12), device=backend.device)
    source = random_maps((2, 3, 4, 6), device=backend.device)
    sources = [x, source, source]
    y = backend.add(x, sources, 1.0, "bilinear", None)
    assert_as_accurate(y, resample_add_reference, x, sources)


# Where PyTorch's own weights are exact; elsewhere it turns 0·∞ = NaN into 10⁻⁸·∞ or back.
@over_modes
@over(["even", "one-axis", "mixed-powers", "area", "non-whole"], quick=["even"], slow=["non-whole"])
def test_nan_and_inf_spread_as_in_pytorch(backend, case, mode):
    x, sources = case.tensors("fp32", backend.device)
    for source in sources:
        source[0, 0, 0, 0] = torch.nan
        source[0, 1, source.shape[2] // 2, source.shape[3] // 2] = torch.inf
        source[-1, -1, -1, -1] = -torch.inf
    y = backend.add(x, sources, 1.0, mode, None)
    expected = resample_add_reference(*on_cpu((x, sources)), mode=mode)
    for has in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(has(y.cpu()), has(expected)), has.__name__


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@over_powers
def test_lattice_rounds_to_nearest_even(backend, case, alpha):
    lattice = 2.0
    x, sources = with_few_bits(case.tensors("fp32", backend.device), step=4.0)
    y = backend.add(x, sources, alpha, "bilinear", lattice)
    update = resample_add_reference(torch.zeros_like(x), sources, alpha=alpha)
    assert ((update / lattice) % 1 == 0.5).any(), "the case has no ties"
    assert torch.equal(y, resample_add_reference(x, sources, alpha=alpha, lattice=lattice))


@over_modes
@over_spreads
def test_lattice_rounds_the_update_alone(backend, case, mode):
    x, sources = case.tensors("fp32", backend.device)
    plain = backend.add(x.zero_(), sources, 1.0, mode, None)
    rounded = backend.add(x, sources, 1.0, mode, 0.125)
    assert torch.equal(rounded, (plain / 0.125).round() * 0.125)


@over_lattices
def test_lattice_round_trip_restores_every_bit(backend, case, dtypes, lattice):
    x, sources = case.tensors(dtypes, backend.device)
    on_lattice(x, lattice)
    y = backend.add(x, sources, 0.7, "bilinear", lattice)
    assert not torch.equal(y, x)
    assert same_bits(backend.add(y, sources, -0.7, "bilinear", lattice), x)
    backend.add_(y, sources, -0.7, "bilinear", lattice)
    assert same_bits(y, x)


@over_out_ops
@pytest.mark.parametrize(
    ("case", "lattice"),
    [
        ("channels-last", 2.0**-8),
        ("empty-batch", None),
        pytest.param("mixed-kinds", None, marks=EMULATED),
    ],
)
def test_out_is_what_resample_add_returns(name, case, lattice):
    backend = BACKENDS[name]
    x, sources = CASES[case].tensors("fp32-mixed", backend.device)
    out = torch.full_like(x, torch.nan)

    def write(out, x, *sources):
        OUT_OPS[name](x, list(sources), [], [], out, -0.7, "bilinear", lattice)

    leaves_alone(write, outputs=1)(out, x, *sources)
    assert same_bits(out, backend.add(x, sources, -0.7, "bilinear", lattice))


@over_out_ops
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_out_may_be_half_of_the_channels(name, layout):
    op, device = OUT_OPS[name], BACKENDS[name].device
    whole = random_maps((2, 7, 4, 6), layout=layout, device=device)
    room = torch.full_like(whole, torch.nan)
    source = random_maps((2, 3, 4, 6), layout=layout, device=device)
    (a, b), (a_out, b_out) = (t.split([4, 3], dim=1) for t in (whole, room))
    op(b, [source], [], [], b_out, 1.0, "bilinear", None)
    assert torch.equal(b_out, b + source) and a_out.isnan().all()
    op(a, [random_like(a)], [], [], a_out, 0.0, "bilinear", None)
    assert torch.equal(room, torch.cat([a, b + source], dim=1))


def test_out_errors():
    x, sources = CASES["even"].tensors()
    with pytest.raises(ValueError, match="resample_add_out: out must have x's shape, dtype and"):
        resample_add_out(x, sources, x[:1])
    with pytest.raises(ValueError, match=r"resample_add_out: sources\[0\] must not share memory"):
        resample_add_out(x.clone(), [x[:, :, :4]], x)
    with pytest.raises(RuntimeError, match="out must have x's shape and dtype"):
        torch.ops.revbifpn.resample_add_out(x, sources, [], [], x[..., :6], 1.0, "bilinear", None)
