"""Kernels that training steps of RevBiFPN-S0 to S6 launch, run as compiled for sm_90.

Calls of the real sizes, with as few images as launch the same kernels, beside the C++ ops and these
in float64. Of large grids some blocks run. Tests take calls that have all pairs of compile-time
constants, without the largest maps; `calls.py check` runs every kernel.
"""

import functools

import calls
import pytest
import torch
from helpers import needs_emulation

from benchmarks.lib.launches import calls_of_step

pytestmark = [
    pytest.mark.slow,
    needs_emulation,
]
CALLS = calls.read()
LARGEST = 2**22
COVERING = [call for call, is_covering in CALLS if is_covering and calls.elements(call) <= LARGEST]


@pytest.mark.parametrize("k", range(len(COVERING)), ids=lambda k: f"{k}-{COVERING[k].op}")
def test_call(k):
    calls.check(COVERING[k])


@functools.cache
def known_kernels() -> frozenset:
    return frozenset().union(*(calls.kernels(call) for call, _ in CALLS))


@pytest.mark.parametrize(
    ("name", "layout"), [("revbifpn_s0", "nchw"), ("revbifpn_s3", "channels_last")]
)
def test_the_calls_launch_every_kernel(name, layout):
    step = calls_of_step(name, 8, calls.SIZES[name].resolution, torch.bfloat16, layout)
    needed = {str(call): call for call in step}.values()
    missing = [call for call in needed if not calls.kernels(call) <= known_kernels()]
    assert not missing, "run tests/ptx/calls.py find"
