"""More than 2³¹ elements, and strides beyond 2³¹: offsets must be 64 bits wide."""

from pathlib import Path

import pytest
import torch
from cases import random_maps
from helpers import assert_as_accurate, same_bits
from norm_act_cases import BACKENDS, CPP, EPS, TRITON, Case

from revbifpn_kernels import resample_add, resample_add_, resample_adjoint, resample_undo
from revbifpn_kernels.ops.norm_act.forward import norm_act_reference
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_reference
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_reference
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums_reference
from revbifpn_kernels.ops.resample.add import plan_resample_add, resample_add_reference
from revbifpn_kernels.ops.resample.adjoint import resample_adjoint_reference
from revbifpn_kernels.ops.resample.undo import resample_undo_reference

GIB = 2**30


@pytest.fixture(autouse=True)
def _no_nan_fill(_nan_fill):
    """Filling gigabytes takes minutes; memory that nobody touches costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.empty_cache()  # of gigabytes, which other workers may need


def available_gib():
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return available * 1024 / GIB


@pytest.mark.slow
def test_add_to_more_than_2_31_elements():
    """In place, and from a source that is one row: only x takes memory."""
    if available_gib() < 6:
        pytest.skip(f"needs 6 GiB of memory, {available_gib():.1f} GiB are available")
    row = torch.randn(1, 1, 1, 16384, dtype=torch.bfloat16)
    x = torch.zeros(1, 2, 32768, 32776, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    resample_add_(x, [row.expand(1, 2, 16384, 16384)], mode="nearest")
    expected = resample_add_reference(torch.zeros(1, 1, 1, 32776).bfloat16(), [row], mode="nearest")
    for plane in range(2):
        for rows in (slice(0, 64), slice(16352, 16416), slice(-64, None)):
            assert torch.equal(x[0, plane, rows], expected[0, 0].expand(64, -1))


@pytest.mark.slow
def test_area_and_adjoint_over_more_than_2_31_elements():
    """Maps that repeat one row, so that only the small side takes memory."""
    row = torch.randn(1, 1, 1, 32776, dtype=torch.bfloat16)
    large = row.expand(1, 2, 32768, 32776)
    x = torch.zeros(1, 2, 4096, 4097, dtype=torch.bfloat16)
    y = resample_add(x, [large])
    expected = resample_add_reference(x[:, :1, :8], [row.expand(1, 1, 64, -1)])
    assert torch.equal(y, expected[:, :, :1].expand_as(y))
    (result,) = resample_adjoint(large, [(4096, 4097)], mode="nearest")
    (expected,) = resample_adjoint_reference(row.expand(1, 1, 8, -1), [(1, 4097)], mode="nearest")
    torch.testing.assert_close(result, expected.expand_as(result), rtol=2**-7, atol=0)


def far_apart(maps, dim=0):
    """`maps` with about 2³¹ elements from the first to the last along `dim`."""
    strides = list(maps.stride())
    strides[dim] = 2**31 // max(1, maps.shape[dim] - 1) + 64
    extent = sum((n - 1) * stride for n, stride in zip(maps.shape, strides, strict=True)) + 1
    storage = torch.empty(extent, dtype=maps.dtype, device=maps.device)
    return storage.as_strided(maps.shape, strides).copy_(maps)


@pytest.mark.parametrize("dim", [0, 2], ids=["images", "rows"])
def test_strides_beyond_2_31(dim):
    def random(*size):
        return far_apart(random_maps((2, 2, *size), torch.bfloat16), dim)

    y, grad, sources = random(8, 12), random(8, 12), [random(4, 6), random(3, 5)]
    results = resample_undo(y, grad, sources)
    assert_as_accurate(results, resample_undo_reference, y, grad, sources)
    expected = resample_add(y, sources)
    assert_as_accurate(expected, resample_add_reference, y, sources)
    assert same_bits(resample_add_(y, sources), expected)


NORM_OPS = {"cpp": CPP, "triton": TRITON}


@pytest.mark.parametrize("name", NORM_OPS)
def test_norm_act_with_strides_beyond_2_31(name):
    """Without the guard of the cases, which copies all that lies between the images."""
    ops, device = NORM_OPS[name], BACKENDS[name].device
    near = Case((2, 16, 8, 12)).inputs("bf16", device)
    norm = far_apart(near.x), *near.norm[1:]
    arguments = far_apart(near.grad), *norm
    statistics = ops["batch_statistics"](norm[0], EPS, None, None, None, 0.1)
    assert_as_accurate(statistics, batch_statistics_reference, near.x, eps=EPS)
    y = ops["norm_act"](*norm, near.gate, "silu")
    assert_as_accurate(y, norm_act_reference, *near.norm, near.gate, act="silu")
    sums = ops["norm_act_sums"](*arguments, "silu", True)
    options = {"act": "silu", "gated": True}
    assert_as_accurate(sums, norm_act_sums_reference, near.grad, *near.norm, **options)
    gates = near.gate, near.grad_means
    results = ops["norm_act_grad"](*arguments, *gates, sums, "silu", True)
    reference = norm_act_grad_reference
    assert_as_accurate(results, reference, near.grad, *near.norm, *gates, act="silu")


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_every_lane_has_a_number_of_32_bits(mode):
    """Two of 32 lanes may own no cell, so there are more lanes than cells."""
    last = 0
    for N in (1_900_000_000, 2_005_000_000, 2_030_000_000, 2_140_000_000):
        x, source = (torch.empty((N, 1, *side), device="meta") for side in ((2, 2), (1, 1)))
        launch, _ = plan_resample_add(x, x, [source], [], [], 1.0, mode, None)
        is_fast = "cells" in launch.kernel.__name__
        assert not is_fast or launch.grid[0] * launch.constants["BLOCK"] <= 2**31
        last = N if is_fast else last
    assert last >= 2_005_000_000
