"""Kernels with one instruction changed: the tests of the ops must notice."""

import pytest
import torch
from helpers import IS_INTERPRETED, assert_as_accurate, same_bits
from mutants import mutant

from benchmarks.lib.ptx import Fault, emulated_gpu
from revbifpn_kernels.ops.norm_act import tiles
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_cuda, norm_act_sums_cuda
from revbifpn_kernels.ops.resample.add import _resample_add_cuda, resample_add_reference
from revbifpn_kernels.ops.resample.adjoint import _resample_adjoint_cuda, resample_adjoint_reference
from revbifpn_kernels.ops.resample.undo import _resample_undo_cuda, resample_undo_reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available() or IS_INTERPRETED, reason="needs kernels compiled for no GPU"
    ),
]
SIZES = [(12, 20), (6, 10), (3, 5)]
FLAT = [side for size in SIZES for side in size]
OPTIONS = {"alpha": 0.7, "mode": "bilinear"}


def maps(dtype):
    """A grid of more than one block, whose last one is not full."""
    x = torch.randn(2, 5, 24, 40).to(dtype)
    return x, torch.randn_like(x), [torch.randn(2, 5, *size).to(dtype) for size in SIZES]


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


def is_noticed(run, check, expected, edit) -> bool:
    """By a fault, by the judge of accuracy, or because the promised bits differ."""
    try:
        with emulated_gpu(edit=edit):
            results = run()
        check(results)
    except (Fault, AssertionError):
        return True
    except (KeyError, NotImplementedError, ValueError):  # not PTX that a GPU would take
        return True
    return not same_bits(results, expected)


MUTANTS = 30
# What computes the same: a different scratch register, a bound that no lane reaches.
ALLOWED = 0.02


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setattr(tiles, "PROGRAMS", 2)
    tiles._plan.cache_clear()
    yield
    tiles._plan.cache_clear()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("op", [add, adjoint, undo, norm_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutants_are_noticed(op, dtype):
    run, check = op(dtype)
    with emulated_gpu():
        expected = run()
    check(expected)
    alive = []
    for seed in range(MUTANTS):
        lines = []

        def edit(ptx, seed=seed, lines=lines):
            if lines or "totals" in ptx:  # a launch per mutant
                return ptx
            changed, *lines[:] = mutant(ptx, seed)
            return changed

        if not is_noticed(run, check, expected, edit):
            alive.append(" -> ".join(lines))
    assert len(alive) <= ALLOWED * MUTANTS + 1, "\n".join(alive)
