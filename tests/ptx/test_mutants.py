"""Kernels with one instruction changed: the tests of the ops must notice."""

import itertools
import sys

import pytest
import torch
from helpers import assert_as_accurate, needs_emulation, same_bits
from mutants import mutant

from benchmarks.lib.ptx import Fault, emulated_gpu
from revbifpn_kernels.ops import tiling
from revbifpn_kernels.ops.norm_act import tiles
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_cuda
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums_cuda
from revbifpn_kernels.ops.resample.add import _resample_add_cuda, resample_add_reference
from revbifpn_kernels.ops.resample.adjoint import _resample_adjoint_cuda, resample_adjoint_reference
from revbifpn_kernels.ops.resample.undo import _resample_undo_cuda, resample_undo_reference

pytestmark = [
    pytest.mark.slow,
    needs_emulation,
]
RESAMPLE = "revbifpn_kernels.ops.resample"
SIZES = [(24, 20), (12, 10), (6, 5)]
FLAT = [side for size in SIZES for side in size]
OPTIONS = {"alpha": 0.7, "mode": "bilinear"}


def maps(dtype):
    """Several blocks, the last not full; chains of cells that begin and end inside the maps."""
    x = torch.randn(2, 7, 48, 40).to(dtype)
    return x, torch.randn_like(x), [torch.randn(2, 7, *size).to(dtype) for size in SIZES]


def add(dtype):
    x, _, sources = maps(dtype)
    return (
        lambda: _resample_add_cuda(x, sources, [], [], *OPTIONS.values(), None),
        lambda y: assert_as_accurate(y, resample_add_reference, x, sources, **OPTIONS),
    )


def adjoint(dtype):
    _, grad, _ = maps(dtype)
    options = {**OPTIONS, "dtype": dtype}
    return (
        lambda: _resample_adjoint_cuda(grad, FLAT, *options.values()),
        lambda each: assert_as_accurate(each, resample_adjoint_reference, grad, SIZES, **options),
    )


def undo(dtype):
    y, grad, sources = maps(dtype)
    return (
        lambda: _resample_undo_cuda(y, grad, sources, [], [], *OPTIONS.values(), None),
        lambda each: assert_as_accurate(each, resample_undo_reference, y, grad, sources, **OPTIONS),
    )


def norm_grad(dtype):
    """A program walks through several images and tiles."""
    x, grad = (torch.randn(5, 11, 23, 29).to(dtype) for _ in range(2))
    channels, planes = torch.rand(4, 11) + 0.5, torch.rand(2, 5, 11)
    given = grad, x, *channels
    with emulated_gpu():
        sums = norm_act_sums_cuda(*given, "silu", True)
    given = *given, *planes, sums
    return (
        lambda: norm_act_grad_cuda(*given, "silu", True),
        lambda each: assert_as_accurate(each, norm_act_grad_cpu, *given),
    )


def norm_act_grad_cpu(*given):
    return torch.ops.revbifpn.norm_act_grad(*given, "silu", True)


def survivor(run, check, expected, seed) -> str | None:
    """The change, if neither a fault nor the judge of accuracy nor the promised bits show it.

    None if it is not PTX that a GPU would take.
    """
    lines = []

    def edit(ptx):
        if lines or "totals" in ptx:  # a launch per mutant
            return ptx
        changed, *lines[:] = mutant(ptx, seed)
        return changed

    try:
        with emulated_gpu(edit=edit, most_steps=2**16):
            results = run()
        check(results)
    except (Fault, AssertionError):
        return ""
    except (KeyError, NotImplementedError, ValueError):
        return None
    return " -> ".join(lines) if same_bits(results, expected) else ""


@pytest.fixture
def loops(monkeypatch):
    """Programs walk through several images and tiles, lanes through chains of several cells."""
    plans = (
        tiles._plan,
        *(sys.modules[f"{RESAMPLE}.{op}"]._plan for op in ("add", "adjoint", "undo")),
    )
    monkeypatch.setattr(tiles, "PROGRAMS", 2)
    monkeypatch.setattr(tiling, "LANES_TO_FILL", 80)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


MUTANTS = 16
KERNELS = {
    "add": (add, torch.bfloat16),
    "adjoint": (adjoint, torch.float32),
    "undo": (undo, torch.bfloat16),
    "norm_grad": (norm_grad, torch.float32),
}


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("name", KERNELS)
def test_mutants_are_noticed(name):
    """But for one: some changes compute the same, as in lanes whose results nobody uses."""
    make, dtype = KERNELS[name]
    run, check = make(dtype)
    with emulated_gpu():
        expected = run()
    check(expected)
    tried = (survivor(run, check, expected, seed) for seed in itertools.count())
    valid = itertools.islice((each for each in tried if each is not None), MUTANTS)
    alive = [each for each in valid if each]
    assert len(alive) <= 1, "\n".join(alive)
