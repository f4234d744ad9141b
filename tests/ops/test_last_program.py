"""Reductions across programs: one launch, counters that are zero between launches, and whose."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from helpers import needs_emulation, same_bits

from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels.ops import last_program
from revbifpn_kernels.ops.last_program import FEWEST_COUNTERS, counters
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_cuda

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _no_counters(monkeypatch):
    monkeypatch.setattr(last_program, "_counters", {})


@pytest.fixture
def cuda(monkeypatch):
    """Stands for PyTorch's devices and streams; `zeros` are on the CPU."""

    class Cuda:
        def __init__(self):
            self.current, self.streams, self.capturing = GPU, {GPU: 1, OTHER: 1}, None

        @contextlib.contextmanager
        def device(self, device):
            before, self.current = self.current, device
            yield
            self.current = before

        def current_stream(self):
            return SimpleNamespace(cuda_stream=self.streams[self.current])

        def is_current_stream_capturing(self):
            return self.current == self.capturing

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


def test_streams_and_devices_share_no_counters(cuda):
    first = counters(GPU, 3)
    cuda.streams[GPU] = 2
    assert counters(GPU, 3) is not first
    cuda.streams[GPU] = 1
    assert counters(GPU, 3) is first
    other = counters(OTHER, 3)
    assert other is not first and counters(OTHER, 3) is other


def test_captured_launches_share_no_counters(cuda):
    kept = counters(GPU, 3)
    cuda.capturing = GPU
    captured = [counters(GPU, 3) for _ in range(2)]
    assert all(each is not kept and len(each) == 3 for each in captured)
    assert captured[0] is not captured[1]
    assert counters(OTHER, 3) is counters(OTHER, 3)
    cuda.capturing = OTHER  # while the first device is current
    assert counters(OTHER, 3) is not counters(OTHER, 3)
    assert counters(GPU, 3) is kept


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
