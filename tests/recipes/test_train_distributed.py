"""torchrun: DDP and FSDP2 on two gloo processes against one, overlap, a killed process' restart."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from processes import on_two_processes
from tiny import tiny
from trainings import (
    EVERY_STEP,
    ROOT,
    TIMEOUT,
    TINY,
    assert_same_run,
    checkpoint,
    ended,
    losses,
    pair,
    rows,
    train,
)

from revbifpn_kernels.recipes.run.processes import World, distributed

pytestmark = pytest.mark.slow
# Group norm does not depend on how a batch is split, and nothing is drawn on the way.
CURVE = ("--norm=group", "--log-every=1", "--opt=momentum", "--lr=0.02", "--drop=0")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "alone", *CURVE)


def assert_same_curve(ours, theirs) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    for one, two in zip(rows(ours / "epochs.csv"), rows(theirs / "epochs.csv"), strict=True):
        assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), abs=1e-5)
    for part in ("model", "ema"):
        one, two = checkpoint(ours)[part], checkpoint(theirs)[part]
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--fsdp", "--accumulate=2")], ids=["ddp", "fsdp"])
def test_two_processes_have_the_loss_curve_of_one(options, alone, tmp_path):
    assert ended(*pair(*CURVE, *options, f"--out={tmp_path}")) == [0, 0]
    assert_same_curve(tmp_path, alone)


def test_batch_norms_are_those_of_the_whole_batch(tmp_path):
    """In the first steps: the norms of few values later make much of a difference in rounding."""
    options = (*CURVE, "--norm=batch", "--epochs=1", "--warmup-epochs=1")
    alone = train(tmp_path / "alone", *options)
    assert ended(*pair(*options, f"--out={tmp_path / 'pair'}")) == [0, 0]
    assert losses(tmp_path / "pair") == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(options, tmp_path, alone):
    """Stopped by a signal that reaches the second process alone."""
    stopped = pair(*CURVE, *options, f"--out={tmp_path}", signalled=(signal.SIGTERM, 3))
    assert ended(*stopped) == [143, 143]
    assert checkpoint(tmp_path)["step"] == 3
    with pytest.warns(UserWarning, match="is of 2 processes, continuing on 1"):
        train(tmp_path, *CURVE, "--resume=auto")
    assert_same_curve(tmp_path, alone)


# A process of torchrun's, the second of which kills itself once, after a step.
KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
import pytest, trainings
from revbifpn_kernels.recipes.classify import data
data.load_digits = trainings.few_digits
mark = Path(sys.argv.pop(1))
if os.environ["RANK"] == "1" and not mark.exists():
    def killed():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    trainings.after_step(pytest.MonkeyPatch(), 6, killed)
sys.exit(trainings.main())
"""


def test_a_killed_process_restarts_all_from_the_last_checkpoint(tmp_path):
    """Batch norm, EMA, dropout: the restarted run ends with the bits of one that nobody killed."""
    options = ("--drop=0.2", "--log-every=1")
    whole, out, script = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed_once.py"
    assert ended(*pair(*options, f"--out={whole}")) == [0, 0]
    script.write_text(KILLED_ONCE)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [sys.executable, "-m", *launcher, str(script), str(tmp_path / "mark"), *TINY]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *options, EVERY_STEP, f"--out={out}", "--resume=auto"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    starts = [line.split("from step ")[1] for line in done.stdout.splitlines() if "from st" in line]
    assert starts == ["0 of 8", "5 of 8"]
    assert done.stdout.count("test accuracy") == 1
    assert_same_run(out, whole)


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


def check_agreement(rank: int) -> None:
    world = World(rank, 2, torch.device("cpu"))
    assert world.any(rank == 1, False) == [True, False]
    assert world.total(torch.tensor([1.0 + rank])).tolist() == [3.0]
    assert world.gathered(rank) == [0, 1]
    assert dist.get_world_size() == 2


def check_all(rank: int) -> None:
    check_agreement(rank)
    check_overlap(rank)


def test_on_two_processes(tmp_path):
    on_two_processes(tmp_path, check_all)
