"""A batch norm as scale and shift of each plane."""

import pytest
import torch
from cases import HAS_GPU
from helpers import assert_as_accurate, leaves_alone, on_this_machine, same_bits

from revbifpn_kernels.ops.norm_act.factors import norm_factors_cuda, norm_factors_reference
from revbifpn_kernels.ops.norm_act.forward import norm_act_reference
from revbifpn_kernels.ops.norm_act.statistics import batch_norm_factors_cuda, batch_statistics_cuda

OPS = torch.ops.revbifpn

BACKENDS = {
    "cpp": ("cpu", leaves_alone(torch.ops.revbifpn.norm_factors)),
    "triton": ("cuda" if HAS_GPU else "cpu", leaves_alone(on_this_machine(norm_factors_cuda))),
}

STATISTICS = {
    "cpp": (OPS.batch_statistics, OPS.batch_norm_factors),
    "triton": tuple(map(on_this_machine, (batch_statistics_cuda, batch_norm_factors_cuda))),
}
EPS, MOMENTUM = 1e-3, 0.1


def arguments(samples, channels, affine=True, kept=True, dtype=torch.float32, device="cpu"):
    mean, weight, bias = (torch.randn(channels, dtype=dtype) for _ in range(3))
    invstd = torch.rand(channels, dtype=dtype) + 0.5
    mask = torch.randn(samples, dtype=dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    values = mean, invstd, weight, bias, mask if kept else None
    return *(t if t is None else t.to(device) for t in values), samples


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 17), (1, 1), (2, 300), (0, 4)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "all"])
def test_factors(backend, shape, affine, kept):
    device, norm_factors = BACKENDS[backend]
    given = arguments(*shape, affine, kept, device=device)
    assert_as_accurate(norm_factors(*given), norm_factors_reference, *given)


def test_float64():
    given = arguments(2, 5, dtype=torch.float64)
    for ours, expected in zip(
        torch.ops.revbifpn.norm_factors(*given), norm_factors_reference(*given), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-15, atol=1e-15)


def test_they_are_the_norm():
    mean, invstd, weight, bias, kept, samples = arguments(3, 5, dtype=torch.float64)
    u = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    scale, shift = torch.ops.revbifpn.norm_factors(mean, invstd, weight, bias, kept, samples)
    y = norm_act_reference(u, mean, invstd, weight, bias, kept[:, None].expand(3, 5))
    torch.testing.assert_close(scale[:, :, None, None] * u + shift[:, :, None, None], y)


def test_opcheck():
    mean, invstd, *affine, _, _ = given = arguments(3, 5)
    torch.library.opcheck(OPS.norm_factors.default, given)
    buffers = mean, invstd, torch.tensor(5)
    given = torch.randn(3, 5, 4, 4), *affine, EPS, *buffers, MOMENTUM
    torch.library.opcheck(OPS.batch_norm_factors.default, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", [(3, 24, 40, 40), (2, 5, 3, 3), (0, 4, 2, 2)], ids=str)
def test_statistics_and_factors_in_one(backend, affine, shape):
    """The bits of `batch_statistics`, and of factors for a single sample."""
    device, norm_factors = BACKENDS[backend]
    statistics, both = STATISTICS[backend]
    x, channels = torch.randn(shape, device=device), shape[1]
    _, _, weight, bias, _, _ = arguments(1, channels, affine, device=device)
    buffers = [
        [torch.ones(channels, device=device) for _ in range(2)] + [torch.tensor(5, device=device)]
        for _ in range(2)
    ]
    expected = statistics(x, EPS, *buffers[0], MOMENTUM)
    ours = both(x, weight, bias, EPS, *buffers[1], MOMENTUM)
    assert same_bits(ours[:2], expected) and same_bits(*buffers)
    assert all(factor.shape == (1, channels) for factor in ours[2:])
    if len(x) == 0:
        assert all(factor.isnan().all() for factor in ours[2:])
    else:
        assert same_bits(ours[2:], norm_factors(*expected, weight, bias, None, 1))


def test_bad_input():
    mean, invstd, weight, bias, kept, samples = arguments(3, 5)
    with torch.device("meta"):
        meta = [t.to("meta") for t in (mean, invstd, weight, bias, kept)]
    norm_factors = torch.ops.revbifpn.norm_factors
    with pytest.raises(ValueError, match="norm_factors: weight must have"):
        norm_factors(*meta[:2], meta[2][:4], *meta[3:], samples)
    with pytest.raises(ValueError, match="batch_norm_factors: bias must have"):
        x = torch.empty(3, 5, 4, 4, device="meta")
        OPS.batch_norm_factors(x, meta[2], meta[3][:4], EPS, None, None, None, MOMENTUM)
    with pytest.raises(ValueError, match=r"norm_factors: kept must have \(\(4,\)"):
        norm_factors(*meta, 4)
    with pytest.raises(
        RuntimeError, match="norm_factors: invstd must be contiguous, of 5 elements"
    ):
        norm_factors(mean, invstd[:4], weight, bias, kept, samples)
    with pytest.raises(RuntimeError, match="norm_factors: kept must be contiguous, of 4 elements"):
        norm_factors(mean, invstd, weight, bias, kept, 4)
