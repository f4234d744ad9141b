"""More than 2³¹ elements, and strides beyond 2³¹: offsets must be 64 bits wide."""

from pathlib import Path

import pytest
import torch
from cases import random_maps
from helpers import assert_as_accurate, same_bits
from norm_act_cases import BACKENDS, EPS, Case
from torch.utils._pytree import tree_map

from revbifpn_kernels import resample_add, resample_add_, resample_adjoint, resample_undo
from revbifpn_kernels.ops.norm_act.launchers import LAUNCHERS
from revbifpn_kernels.ops.norm_act.ops import (
    batch_statistics_reference,
    norm_act_grad_reference,
    norm_act_reference,
    norm_act_sums_reference,
)
from revbifpn_kernels.ops.resample.add import resample_add_reference
from revbifpn_kernels.ops.resample.adjoint import resample_adjoint_reference
from revbifpn_kernels.ops.resample.undo import resample_undo_reference

GIB = 2**30
H, W = 32768, 32776
# Rows of x to look at: the first, those around element 2³¹ (in the second plane), the last.
EDGES = (0, H // 2, H - 64)


@pytest.fixture(autouse=True)
def _no_nan_fill(_nan_fill):
    """Filling gigabytes takes minutes; the rows that are looked at are set by hand."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def require_memory(gib):
    lines = Path("/proc/meminfo").read_text().splitlines()
    (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if available * 1024 < gib * GIB:
        pytest.skip(f"needs {gib} GiB of memory, {available / 2**20:.1f} GiB are available")


def striped_maps(height, width):
    """(1, 2, height, width) in bfloat16, zero but for random stripes at the edges."""
    maps = torch.zeros(1, 2, height, width, dtype=torch.bfloat16)
    for edge in EDGES:
        row = edge * height // H
        stripe = maps[:, :, row : row + 64 * height // H]
        stripe.copy_(torch.randn(stripe.shape))
    return maps


def crop(maps, edge):
    """The part of a stripe that lies in `maps`, 64 rows for a map of the full height."""
    row = edge * maps.shape[2] // H
    return maps[:, :, row : row + 64 * maps.shape[2] // H]


def inner(maps):
    """Without the outer rows of a crop, which would see beyond its edge."""
    return maps[:, :, 2:-2]


def assert_stripes_are_right(ours, reference, *large):
    for edge in EDGES:
        crops = [crop(maps, edge) for maps in large]
        assert_as_accurate(
            tree_map(lambda maps, edge=edge: inner(crop(maps, edge)), ours),
            lambda *crops: tree_map(inner, reference(*crops)),
            *crops,
        )


@pytest.mark.slow
@pytest.mark.parametrize("op", [resample_add, resample_add_])
def test_add_of_more_than_2_31_elements(op):
    require_memory(12)
    x, source = striped_maps(H, W), striped_maps(H // 2, W // 2)
    assert x.numel() > 2**31
    y = op(x.clone() if op is resample_add_ else x, [source])
    assert_stripes_are_right(y, lambda x, s: resample_add_reference(x, [s]), x, source)


@pytest.mark.slow
def test_undo_of_more_than_2_31_elements():
    require_memory(13)
    y, source = striped_maps(H, W), striped_maps(H // 2, W // 2)
    results = resample_undo(y, y, [source])
    assert_stripes_are_right(results, lambda y, s: resample_undo_reference(y, y, [s]), y, source)


@pytest.mark.slow
def test_area_of_more_than_2_31_elements():
    require_memory(12)
    x, source = striped_maps(H // 8, W // 8), striped_maps(H, W)
    y = resample_add(x, [source])
    assert_stripes_are_right(y, lambda x, s: resample_add_reference(x, [s]), x, source)
    (result,) = resample_adjoint(y, [(H, W)])
    assert_stripes_are_right(
        result, lambda y: resample_adjoint_reference(y, [(y.shape[2] * 8, W)])[0], y
    )


def far_apart(maps):
    """`maps` with 2³¹ elements between its images; memory that nobody touches costs nothing."""
    N, C, H, W = maps.shape
    stride = 2**31 + 64
    storage = torch.empty(stride * (N - 1) + maps[0].numel(), dtype=maps.dtype, device=maps.device)
    far = storage.as_strided(maps.shape, (stride, H * W, W, 1))
    return far.copy_(maps)


def test_strides_beyond_2_31():
    y, grad = (far_apart(random_maps((2, 2, 8, 12), torch.bfloat16)) for _ in range(2))
    sources = [far_apart(random_maps((2, 2, *size), torch.bfloat16)) for size in [(4, 6), (3, 5)]]
    results = resample_undo(y, grad, sources)
    assert_as_accurate(results, resample_undo_reference, y, grad, sources)
    expected = resample_add(y, sources)
    assert_as_accurate(expected, resample_add_reference, y, sources)
    assert same_bits(resample_add_(y, sources), expected)


NORM_OPS = {"cpp": lambda name: getattr(torch.ops.revbifpn, name), "triton": LAUNCHERS.__getitem__}


@pytest.mark.parametrize("name", NORM_OPS)
def test_norm_act_with_strides_beyond_2_31(name):
    """Without the guard of the cases, which copies all that lies between the images."""
    find, device = NORM_OPS[name], BACKENDS[name].device
    near = Case((2, 16, 8, 12)).inputs("bf16", device)
    norm = far_apart(near.x), *near.norm[1:]
    arguments = far_apart(near.grad), *norm
    statistics = find("batch_statistics")(norm[0], EPS, None, None, None, 0.1)
    assert_as_accurate(statistics, batch_statistics_reference, near.x, eps=EPS)
    y = find("norm_act")(*norm, near.gate, "silu")
    assert_as_accurate(y, norm_act_reference, *near.norm, near.gate, act="silu")
    sums = find("norm_act_sums")(*arguments, "silu", True)
    options = {"act": "silu", "gated": True}
    assert_as_accurate(sums, norm_act_sums_reference, near.grad, *near.norm, **options)
    gates = near.gate, near.grad_means
    results = find("norm_act_grad")(*arguments, *gates, sums, "silu", True)
    reference = norm_act_grad_reference
    assert_as_accurate(results, reference, near.grad, *near.norm, *gates, act="silu")
