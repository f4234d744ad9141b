"""Reductions across programs: one launch, counters that are zero between launches, and whose."""

import pytest
import torch
from helpers import needs_emulation, same_bits

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops import last_program
from revbifpn_kernels.ops.last_program import FEWEST_COUNTERS, counters
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_cuda

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_counters(monkeypatch):
    monkeypatch.setattr(last_program, "_kept", {})


@pytest.fixture
def cuda(monkeypatch):
    """Stands for PyTorch's streams; `zeros` are on the CPU."""

    class Cuda:
        cuda_stream, is_capturing = 1, False

        def current_stream(self, device):
            return self

        def is_current_stream_capturing(self):
            return self.is_capturing

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **rest: zeros(*size, **rest))
    monkeypatch.setattr(torch, "cuda", stand_in := Cuda())
    return stand_in


def test_counters_are_kept_and_grow():
    few = counters(CPU, 3)
    assert few.dtype == torch.int32 and few.eq(0).all()
    assert counters(CPU, FEWEST_COUNTERS) is few
    many = counters(CPU, FEWEST_COUNTERS + 1)
    assert len(many) > FEWEST_COUNTERS and many.eq(0).all()
    assert counters(CPU, 3) is many


def test_streams_share_no_counters(cuda):
    first = counters(GPU, 3)
    cuda.cuda_stream = 2
    assert counters(GPU, 3) is not first
    cuda.cuda_stream = 1
    assert counters(GPU, 3) is first


def test_captured_launches_share_no_counters(cuda):
    kept = counters(GPU, 3)
    cuda.is_capturing = True
    captured = [counters(GPU, 3) for _ in range(2)]
    assert all(each is not kept and len(each) == 3 for each in captured)
    assert captured[0] is not captured[1]


@needs_emulation
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_launch_that_leaves_its_counters_zero(layout):
    x = torch.randn(3, 24, 40, 40).to(memory_format=layout)
    with emulated_gpu() as gpu:
        first, second = (batch_statistics_cuda(x, 1e-5, None, None, None, 0.1) for _ in range(2))
    assert len(gpu.launches) == 2 and same_bits(first, second)
    assert counters(CPU, 1).eq(0).all() and not any(values.isnan().any() for values in first)
    parts = gpu.launches[0].grid[0]
    assert parts > 24, "one program per channel: nothing is shared"
