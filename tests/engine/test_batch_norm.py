"""Norms: running statistics move once per step, and the recompute repeats the forward."""

import pytest
import torch
from chains import LATTICE, pair_of
from steps import assert_same_bits, loss_of
from torch import nn

from revbifpn_kernels import RevBlock
from revbifpn_kernels.reversible.recompute import batch_norm, modes
from revbifpn_kernels.reversible.recompute.checks import NotRepeatable
from revbifpn_kernels.reversible.recompute.module_state import Transform


def assert_repeats(make, *, steps: int = 1) -> None:
    results = []
    for net in pair_of(make):
        for step in range(steps):
            torch.manual_seed(step)
            net.zero_grad()
            loss_of(net(torch.randn(2, 8, 6, 6))).backward()
        results.append(
            {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
        )
        results[-1]["generator"] = torch.get_rng_state()
    assert_same_bits(*results)


class Norm1d(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, **options)

    def forward(self, x):
        return self.norm(x.flatten(2)).view_as(x)


NORMS = {
    "momentum none": lambda: nn.BatchNorm2d(4, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "1d": Norm1d,
    "1d momentum none": lambda: Norm1d(momentum=None),
    "synchronised, one process": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "twice": lambda: nn.Sequential(*[nn.BatchNorm2d(4)] * 2),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_norms_move_once_and_repeat(norm):
    assert_repeats(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(), nn.GELU()), steps=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_maps_reuse_the_statistics(dtype, layout):
    """Maps beyond `batch_norm.SMALL`, whose batch is not reduced again."""

    def make():
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.BatchNorm2d(4))

    results = []
    for net in pair_of(make):
        net.to(memory_format=layout)
        torch.manual_seed(0)
        x = torch.randn(3, 8, 64, 64).contiguous(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = loss_of(net(x))
        loss.backward()
        results.append({name: p.grad for name, p in net.named_parameters()} | {"x": x.grad})
        results[-1] |= dict(net.named_buffers())
    assert_same_bits(*results)


def test_norms_of_channel_slices_restore_every_bit():
    """PyTorch normalises strided maps by another kernel; forward and recompute take it."""
    block = RevBlock(nn.BatchNorm2d(4), nn.BatchNorm2d(4), lattice=LATTICE)
    for p in block.parameters():
        nn.init.uniform_(p, 0.5, 1.5)  # with weights of 1 both kernels round alike
    restored = []
    inverse_step = block.backward_step

    def keep(ys, grad_ys, step):
        restored.append(inverse_step(ys, grad_ys, step))
        return restored[-1]

    block.__class__ = type("Watched", (RevBlock,), {"backward_step": staticmethod(keep)})
    x = (torch.randn(3, 8, 64, 64) / LATTICE).round() * LATTICE + 0.0
    loss_of(block(x)).backward()
    assert torch.equal(restored[0][0][0], x)


def test_statistics_of_one_process_are_not_taken_for_those_of_all():
    record = modes.CallRecord(Transform(nn.Identity()))
    record.events.append(batch_norm.Statistics(torch.zeros(2), torch.ones(2)))
    recorder = modes.ReplayMode(record, {})
    with pytest.raises(NotRepeatable, match="normalised a batch, which it did not do there"):
        batch_norm._normalise_together(nn.SyncBatchNorm(2), recorder, torch.ones(1, 2, 3, 3))
