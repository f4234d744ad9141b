"""torchrun: DDP and FSDP2 on two gloo processes against one, overlap, a killed rank's restart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import on_two_processes
from tiny import tiny
from torch import nn
from trainings import (
    TINY,
    assert_same_run,
    checkpoint,
    ended,
    losses,
    pair,
    rows,
    train,
    wait_for_step,
)

from revbifpn_kernels.recipes.run.processes import World, distributed, share_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
# Group norm does not depend on how a batch is split, and nothing is drawn on the way.
CURVE = ("--norm=group", "--log-every=1", "--opt=momentum", "--lr=0.02", "--epochs=3", "--drop=0")


def torchrun(*arguments: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher += ["--max-restarts=1", "-m", "revbifpn_kernels.train"]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return subprocess.Popen(
        [sys.executable, *launcher, *TINY, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("runs") / "alone", *CURVE)


@pytest.mark.parametrize("options", [(), ("--fsdp", "--accumulate=2")], ids=["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one(options, alone, tmp_path):
    assert ended(pair(*CURVE, *options, f"--out={tmp_path}")) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
    ours, theirs = (rows(out / "epochs.csv") for out in (tmp_path, alone))
    for ours_row, theirs_row in zip(ours, theirs, strict=True):
        assert float(ours_row["val_loss"]) == pytest.approx(float(theirs_row["val_loss"]), abs=1e-5)
    for part in ("model", "ema"):
        one, two = checkpoint(alone)[part], checkpoint(tmp_path)[part]
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_killed_rank_restarts_all_from_the_last_checkpoint(tmp_path):
    """Batch norm, EMA, dropout: the restarted run ends with the bits of one that nobody killed."""
    options = ("--drop=0.2", "--log-every=1", "--epochs=6")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert ended(pair(*options, f"--out={whole}")) == [0, 0]
    process = torchrun(*options, "--checkpoint-minutes=0", f"--out={out}", "--resume=auto")
    wait_for_step(out, 6)
    os.kill(worker_of(process.pid), signal.SIGKILL)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 0, said
    starts = [line.split("from step ")[1] for line in said.splitlines() if "from step " in line]
    assert len(starts) == 2 and starts[0] == "0 of 24" and int(starts[1].split()[0]) >= 5
    assert said.count("test accuracy") == 1
    assert_same_run(out, whole)
    assert losses(out) == losses(whole)


def worker_of(launcher: int) -> int:
    """The second rank's process."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            environment = (entry.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"RANK=1" in environment:
            return int(entry.parent.name)
    raise AssertionError("no second rank was found")


def check_overlap(rank: int) -> None:
    """Of an S0, in the trace: gradients are reduced before the backward has come to its end."""
    world = World(rank, 2, torch.device("cpu"))
    net = distributed(tiny(extra_silos=3, widths=(96, 96, 96, 96)), world, fsdp=False)
    images = torch.randn(2, 3, 64, 64)
    net(images).sum().backward()  # buckets are ordered after the first step
    with torch.profiler.profile() as profile:
        net(images).sum().backward()
    reduced = [e.time_range for e in profile.events() if "all_reduce" in e.name.lower()]
    restored = [e.time_range for e in profile.events() if e.name == "_BlockBackward"]
    assert len(reduced) > 1, "one bucket holds all gradients"
    assert sum(time.start < restored[-1].start for time in reduced) >= len(reduced) // 2


def check_statistics(rank: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2).eval())
    model[0].running_mean.fill_(float(rank))
    model[1].running_mean.fill_(float(rank))
    share_statistics(model, World(rank, 2, torch.device("cpu")))
    assert model[0].running_mean.tolist() == [0.5] * 3
    assert model[0].running_var.tolist() == [1.0] * 3
    assert model[1].running_mean.tolist() == [rank] * 2  # frozen


def check_agreement(rank: int) -> None:
    world = World(rank, 2, torch.device("cpu"))
    assert world.any(rank == 1, False) == [True, False]
    assert world.total(torch.tensor([1.0 + rank])).tolist() == [3.0]
    assert world.gathered(rank) == [0, 1]
    assert dist.get_world_size() == 2


def check_all(rank: int) -> None:
    check_statistics(rank)
    check_agreement(rank)
    check_overlap(rank)


def test_on_two_processes(tmp_path):
    on_two_processes(tmp_path, check_all)


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(options, tmp_path, alone):
    """Stopped by a signal that reaches the second rank alone."""
    processes = pair(*CURVE, *options, f"--out={tmp_path}")
    wait_for_step(tmp_path, 3)
    processes[1].terminate()
    assert ended(processes) == [143, 143]
    assert 3 <= checkpoint(tmp_path)["step"] < 12
    with pytest.warns(UserWarning, match="is of 2 processes, continuing on 1"):
        train(tmp_path, *CURVE, "--resume=auto")
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
