"""Counted memory: of a few and of more images, as a real step allocates it."""

import pytest
import torch
from torch import nn

from benchmarks import bench_memory
from benchmarks.lib import memory
from revbifpn_kernels import training_memory
from revbifpn_kernels.recipes.detect import memory as detect_memory
from revbifpn_kernels.recipes.detect import options

MIB = 2**20


def conv_net():
    """Neither norms nor linear layers, so that all that is saved is maps."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 4, 1), nn.Hardswish()
    )


def test_slope():
    net = conv_net()
    found = memory.slope(net, (110, 1200), (130, 1400))  # held, peak of two; of four
    assert (found.held, found.peak) == (10, 100)
    parameters = sum(p.numel() for p in net.parameters()) * 4
    assert found.constant == 3 * parameters + 1000


def test_the_count_equals_a_real_step():
    net, image = conv_net(), torch.randn(2, 3, 48, 48)
    net(image).sum().backward()
    held, peak = memory.held_and_peak(lambda: net(image).sum())
    counted = training_memory(net, tuple(image.shape))
    maps = 2 * 48 * 48 * 4 * (8 + 8 + 4)  # what convolutions and activations save
    assert counted.held == pytest.approx(held, abs=1024) == pytest.approx(maps, abs=1024)
    assert counted.peak <= peak <= counted.peak + MIB  # workspaces


def test_rows_of_detection_are_those_that_the_command_prints(monkeypatch, capsys):
    backbones = {"a small net": conv_net, "a layer": lambda: nn.Conv2d(3, 8, 3)}
    monkeypatch.setattr(detect_memory, "candidates", lambda options: backbones.items())
    detect_memory.print_table(options.parse(["--memory"]))
    printed = capsys.readouterr().out
    rows = bench_memory.detection_rows()
    assert [row["op"] for row in rows] == list(backbones) and "512×512" in printed
    for row in rows:
        assert row["shape"] == "1x3x512x512"
        numbers = [row[column] for column in ("parameters", "held_mib", "peak_mib")]
        assert " ".join([row["op"], *numbers]) in " ".join(printed.split())


def test_jobs_count_each_network_once_per_mode_and_dtype():
    run = bench_memory.argparse.Namespace(
        parts=("images", "depth"), models=["revbifpn_s0", "efficientnet_b0"], quick=True
    )
    jobs = [(job.func.__name__, *job.args) for job in bench_memory.jobs_of(run)]
    assert len(jobs) == len(set(jobs)) == 3 * 2 + 2 * 2 + 2
    assert ("depth_row", "checkpoint", 2) in jobs
