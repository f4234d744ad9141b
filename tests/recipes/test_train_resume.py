"""Nothing is lost: runs that are stopped, killed, out of disk or out of numbers."""

import os
import random
import resource
import signal
import time

import pytest
import torch
from trainings import (
    FEW,
    STEPS,
    TINY,
    assert_same_run,
    checkpoint,
    fill_disk,
    finished,
    losses,
    rows,
    started,
    train,
    wait_for_step,
    write_pictures,
)

from revbifpn_kernels.recipes.classify import report
from revbifpn_kernels.recipes.run import checkpoint as files
from revbifpn_kernels.recipes.run import console
from revbifpn_kernels.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
# All that draws numbers: order, augmentation, mixing, dropout, stochastic depth.
DRAWING = (
    *("--augment=affine", "--mixup=0.2", "--drop=0.2", "--drop-path=0.2"),
    *("--log-every=1", "--accumulate=2", "--epochs=2"),
)
EVERY_STEP = "--checkpoint-minutes=0"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert finished(*DRAWING, f"--out={out}") == 0
    return out


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_between_steps_and_it_goes_on_bit_for_bit(
    kind, uninterrupted, tmp_path
):
    again = (*DRAWING, f"--out={tmp_path}", "--resume=auto", "--workers=1")
    process = started(*again)
    wait_for_step(tmp_path, 2)  # in the middle of an epoch
    os.kill(process.pid, kind)
    process.join(60)
    assert process.exitcode == 128 + kind
    assert 2 <= checkpoint(tmp_path)["step"] < STEPS
    assert finished(*again, "--workers=0") == 0
    assert_same_run(tmp_path, uninterrupted)
    assert losses(tmp_path) == losses(uninterrupted)
    for table, columns in (
        ("steps.csv", ("step", "epoch", "gradient", "lr")),
        ("epochs.csv", ("step", "train_loss", "val_loss", "val_accuracy")),
    ):
        ours, theirs = (rows(out / table) for out in (tmp_path, uninterrupted))
        assert [[row[c] for c in columns] for row in ours] == [
            [row[c] for c in columns] for row in theirs
        ]


def kill_at_random_moments(out, options, kills: int, seed: int) -> list[int]:
    """Start the run again and again, kill it each time; the steps that its checkpoints are of.

    A third of the kills come while it starts, the others among its steps.
    """
    draw = random.Random(seed)
    file, steps = out / "checkpoint.pt", []

    def written() -> int:
        return file.stat().st_mtime_ns if file.exists() else 0

    for k in range(kills):
        before, deadline = written(), time.monotonic() + 60
        process = started(*options, f"--out={out}", "--resume=auto", EVERY_STEP)
        while k % 3 and written() == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.join()
        steps.append(checkpoint(out)["step"] if file.exists() else 0)
    assert finished(*options, f"--out={out}", "--resume=auto", EVERY_STEP) == 0
    return steps


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(uninterrupted, tmp_path):
    steps = kill_at_random_moments(tmp_path, DRAWING, 3, seed=0)
    assert steps == sorted(steps)
    assert_same_run(tmp_path, uninterrupted)
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    options = (*DRAWING, "--epochs=20")
    assert finished(*options, f"--out={tmp_path / 'whole'}") == 0
    steps = kill_at_random_moments(tmp_path / "killed", options, 20, seed=1)
    print(steps)
    assert steps == sorted(steps) and len(set(steps)) > 10 and steps[-1] < 80
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_kill_between_two_steps_loses_no_more_than_the_interval(tmp_path, monkeypatch):
    """The file on the disk is at each moment of the step before, or of this one."""
    seen = []
    replace = os.replace

    def watched(source, target):
        if str(target).endswith("checkpoint.pt"):
            before = checkpoint(tmp_path)["step"] if os.path.exists(target) else 0
            seen.append((before, torch.load(source, weights_only=True)["step"]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    train(tmp_path, EVERY_STEP)
    assert seen == [(step, step + 1) for step in range(STEPS)]


def test_a_file_is_old_or_new_never_half(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, b"old" * 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the disk fails in mid-file
        with pytest.raises(OSError):
            files.write_atomically(path, b"new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" * 1000
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fill_disk(patch, files, writes=2)
        assert main([*TINY, f"--out={tmp_path}", EVERY_STEP]) == 1
    said = capsys.readouterr().err
    assert "checkpoint of step 3 not written" in said
    assert "No space left on device; that of step 2 stays" in said
    assert "make room and run again with --resume auto" in said
    assert checkpoint(tmp_path)["step"] == 2
    assert main([*TINY, f"--out={tmp_path}", "--resume=auto"]) == 0
    assert "from step 2 of 8" in capsys.readouterr().out


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path, monkeypatch, capsys):
    train(tmp_path)
    (tmp_path / "skipped.txt").write_text("a.png\tdamaged\n")
    for module in (report, console):
        fill_disk(monkeypatch, module)
    assert main([*TINY, f"--out={tmp_path}", "--resume=auto"]) == 0
    assert "a report could not be written, training goes on" in capsys.readouterr().err
    assert (tmp_path / "skipped.txt").read_text() == "a.png\tdamaged\n"
    assert len(losses(tmp_path)) == len(rows(tmp_path / "steps.csv")) > 0


def test_moved_pictures_are_the_same_and_weights_to_start_from_may_be_gone(tmp_path, capsys):
    data = write_pictures(tmp_path / "data", each=20)
    assert main([*FEW, "--epochs=0", f"--data={data}", f"--out={tmp_path / 'start'}"]) == 0
    weights = tmp_path / "start" / "weights.safetensors"
    options = [*FEW, f"--out={tmp_path / 'run'}", f"--checkpoint={weights}", "--resume=auto"]
    assert main([*options, f"--data={data}"]) == 0
    weights.unlink()
    moved = data.rename(tmp_path / "moved")
    assert main([*options, f"--data={moved}/"]) == 0
    next(moved.glob("cat/*.png")).rename(moved / "cat" / "other.png")
    assert main([*options, f"--data={moved}/"]) == 1
    assert "training images: " in capsys.readouterr().err


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path, capsys):
    train(tmp_path)
    changed = ["--resume=auto", "--lr=0.5", "--set=features=48", "--split-seed=1", "--workers=1"]
    assert main([*TINY, f"--out={tmp_path}", *changed]) == 1
    said = capsys.readouterr().err
    assert "--lr: 0.004 in the checkpoint, 0.5 now" in said
    assert "features: 24 in the checkpoint, 48 now" in said
    assert "--split-seed: 0 in the checkpoint, 1 now" in said
    assert "training images: 1259 images, " in said
    assert "--workers" not in said


def test_a_finished_run_is_only_tested_again(tmp_path, capsys):
    train(tmp_path)
    before = checkpoint(tmp_path)
    curve = losses(tmp_path)
    capsys.readouterr()
    train(tmp_path, "--resume=auto")
    assert "test accuracy" in capsys.readouterr().out.splitlines()[-1]
    assert checkpoint(tmp_path)["step"] == before["step"] and losses(tmp_path) == curve


@pytest.mark.parametrize("is_list", [False, True])
def test_a_damaged_checkpoint_is_named(is_list, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 nothing more")
    if is_list:
        torch.save([1, 2], path)
    assert main([*TINY, f"--out={tmp_path}", "--resume=auto"]) == 1
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said and "start anew in another --out" in said


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    wild = ["--lr=1e30", "--clip-grad=0", "--warmup-epochs=1", "--log-every=2", EVERY_STEP]
    assert main([*TINY, f"--out={tmp_path}", *wild]) == 1
    said = capsys.readouterr().err
    kept = checkpoint(tmp_path)
    assert f"in step {kept['step'] + 1} (epoch 1), learning rate " in said
    assert f"last good checkpoint: {tmp_path}/checkpoint.pt of step {kept['step']}" in said
    assert all(t.isfinite().all() for t in kept["model"].values())
