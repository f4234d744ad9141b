"""resample_add_out: resample_add into memory that is there, such as half of the channels."""

import pytest
import torch
from cases import CASES, HAS_GPU, random_like, random_maps
from helpers import leaves_alone, same_bits

from revbifpn_kernels import resample_add
from revbifpn_kernels.ops.resample.add import _resample_add_out_cuda, resample_add_out

BACKENDS = {
    "cpp": ("cpu", lambda *args: torch.ops.revbifpn.resample_add_out(*args)),
    "triton": ("cuda" if HAS_GPU else "cpu", _resample_add_out_cuda),
}
over_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@over_backends
@pytest.mark.parametrize("case", ["even", "odd", "channels-last", "mixed-kinds", "empty-batch"])
@pytest.mark.parametrize("lattice", [None, 2.0**-8])
def test_writes_what_resample_add_returns(backend, case, lattice):
    device, op = backend
    x, sources = CASES[case].tensors("fp32-mixed", device)
    expected = resample_add(x, sources, alpha=-0.7, lattice=lattice)
    out = torch.full_like(x, float("nan"))

    def write(out, x, *sources):
        op(x, list(sources), [], [], out, -0.7, "bilinear", lattice)

    leaves_alone(write, outputs=1)(out, x, *sources)
    if device == "cpu" and backend is BACKENDS["triton"]:
        torch.testing.assert_close(out, expected)
    else:
        assert same_bits(out, expected)


@over_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_halves_of_channels(backend, layout):
    device, op = backend
    whole = random_maps((2, 7, 4, 6), layout=layout, device=device)
    room = torch.full_like(whole, float("nan"))
    source = random_maps((2, 3, 4, 6), layout=layout, device=device)
    (a, b), (a_out, b_out) = (t.split([4, 3], dim=1) for t in (whole, room))
    op(b, [source], [], [], b_out, 1.0, "bilinear", None)
    assert torch.equal(b_out, b + source) and a_out.isnan().all()
    op(a, [random_like(a)], [], [], a_out, 0.0, "bilinear", None)
    assert torch.equal(room, torch.cat([a, b + source], dim=1))


def test_errors():
    x, sources = CASES["even"].tensors()
    with pytest.raises(ValueError, match="resample_add_out: out must have x's shape, dtype and"):
        resample_add_out(x, sources, x[:1])
    with pytest.raises(ValueError, match=r"resample_add_out: sources\[0\] must not share memory"):
        resample_add_out(x.clone(), [x[:, :, :4]], x)
    with pytest.raises(RuntimeError, match="out must have x's shape and dtype"):
        torch.ops.revbifpn.resample_add_out(x, sources, [], [], x[..., :6], 1.0, "bilinear", None)
