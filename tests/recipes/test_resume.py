"""Nothing is lost: runs of both commands that are stopped, killed, or out of disk or numbers."""

import os
import resource
import signal

import detections
import pytest
import torch
import trainings
from trainings import (
    EVERY_STEP,
    FakeTime,
    Killed,
    after_step,
    assert_same_run,
    checkpoint,
    ended,
    fill_disk,
    kill,
    losses,
    rows,
    started,
    terminate,
    train,
)

from revbifpn_kernels.recipes.classify import session
from revbifpn_kernels.recipes.classify.loop import ClassifierLoop
from revbifpn_kernels.recipes.run import checkpoint as files
from revbifpn_kernels.recipes.run import console, tables
from revbifpn_kernels.recipes.run.checkpoint import Keeper

from .conftest import DRAWING

BOTH = pytest.mark.parametrize("command", [trainings, detections], ids=["train", "detect"])


def test_a_signal_ends_a_run_between_steps_and_it_goes_on_bit_for_bit(
    trained, tmp_path, monkeypatch, capsys
):
    again = [*trainings.TINY, *DRAWING, f"--out={tmp_path / 'run'}", "--resume=auto"]
    with monkeypatch.context() as patch:
        after_step(patch, 2, terminate)  # in the middle of an epoch
        assert trainings.main(again) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["step"] == 2
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 2 of 8; checkpoint: " in said
    assert f"continue with --out {tmp_path / 'run'} --resume auto" in said
    assert trainings.main(again) == 0
    assert_same_run(tmp_path / "run", trained)
    for table, columns in (
        ("steps.csv", ("step", "epoch", "gradient", "lr")),
        ("epochs.csv", ("step", "train_loss", "val_loss", "val_accuracy")),
    ):
        ours, theirs = (rows(out / table) for out in (tmp_path / "run", trained))
        assert [[row[c] for c in columns] for row in ours] == [
            [row[c] for c in columns] for row in theirs
        ]


def test_a_signal_ends_a_detector_between_steps_and_it_goes_on_bit_for_bit(tmp_path, monkeypatch):
    options = ("--masks", "--flip=0.5", "--log-every=1")
    whole = detections.detect(tmp_path / "whole", *options)
    again = [*detections.TINY, *options, f"--out={tmp_path / 'run'}", "--resume=auto"]
    with monkeypatch.context() as patch:
        after_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert detections.main(again) == 128 + signal.SIGINT
    assert checkpoint(tmp_path / "run")["step"] == 1
    assert detections.main(again) == 0
    assert_same_run(tmp_path / "run", whole)


def kill_in_write(patch, step: int) -> None:
    """Kills a run whose checkpoint of a step is written, and not yet in its place."""
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("checkpoint.pt") and step == 1 + (
            checkpoint(target.parent)["step"] if target.exists() else 0
        ):
            raise Killed
        replace(source, target)

    patch.setattr(os, "replace", killed)


def test_a_run_that_is_killed_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    """Before its first checkpoint, in a write, between a step and its checkpoint, at the end."""
    options = (*DRAWING, EVERY_STEP, "--resume=auto")
    kept = []
    for place in (
        lambda patch: after_step(patch, 1, kill),
        lambda patch: kill_in_write(patch, 3),
        lambda patch: after_step(patch, 6, kill),
        lambda patch: patch.setattr(session, "write_result", lambda *arguments: kill()),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            place(patch)
            train(tmp_path / "run", *options)
        path = tmp_path / "run" / "checkpoint.pt"
        kept.append(checkpoint(path.parent)["step"] if path.exists() else 0)
    assert kept == [0, 2, 5, 8]
    train(tmp_path / "run", *options)
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_with_the_same_bits(trained, tmp_path):
    options = (*DRAWING, EVERY_STEP, f"--out={tmp_path / 'run'}", "--resume=auto", "--workers=1")
    for step in (2, 5):
        assert ended(started(*options, signalled=(signal.SIGKILL, step))) == [-signal.SIGKILL]
        assert checkpoint(tmp_path / "run")["step"] == step - 1
    assert ended(started(*options)) == [0]
    assert_same_run(tmp_path / "run", trained)


def test_a_checkpoint_is_written_when_it_is_due(tmp_path, monkeypatch):
    FakeTime(monkeypatch, ClassifierLoop)
    saved, save = [], Keeper.save
    monkeypatch.setattr(Keeper, "save", lambda self: saved.append(self.run.step) or save(self))
    train(tmp_path, "--checkpoint-minutes=0.05", "--set=drop_rate=0.1")
    assert saved == [3, 4, 7, 8]  # after three seconds, and after each epoch
    assert float(rows(tmp_path / "steps.csv")[-1]["images_per_s"]) == 32


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


@BOTH
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fill_disk(patch, files, writes=2)
        status = command.main([*command.TINY, f"--out={tmp_path}", EVERY_STEP])
    said = capsys.readouterr().err
    assert "checkpoint of step 3 not written" in said
    assert said.count("No space left on device; that of step 2 stays") == command.STEPS - 2
    assert checkpoint(tmp_path)["step"] == 2
    if command is trainings:  # which also writes weights
        assert status == 1 and "make room and run again with --resume auto" in said
        train(tmp_path, "--resume=auto")
        assert "from step 2 of 8" in capsys.readouterr().out


def test_a_full_disk_costs_rows_and_not_the_run(trained, monkeypatch, capsys):
    (trained / "skipped.txt").write_text("a.png\tdamaged\n")
    for module in (tables, console):
        fill_disk(monkeypatch, module)
    train(trained, *DRAWING, "--resume=auto")
    assert "a report could not be written, training goes on" in capsys.readouterr().err
    assert (trained / "skipped.txt").read_text() == "a.png\tdamaged\n"
    assert len(losses(trained)) == trainings.STEPS


def test_a_changed_configuration_is_refused_with_the_difference(trained, capsys):
    changed = ["--resume=auto", "--lr=0.5", "--set=features=48", "--split-seed=1", "--workers=1"]
    assert trainings.main([*trainings.TINY, *DRAWING, f"--out={trained}", *changed]) == 1
    said = capsys.readouterr().err
    assert "--lr: 0.004 in the checkpoint, 0.5 now" in said
    assert "features: 24 in the checkpoint, 48 now" in said
    assert "--split-seed: 0 in the checkpoint, 1 now" in said
    assert "training images: 140 images, " in said and "--workers" not in said


def test_a_changed_detector_is_refused_with_the_difference(tmp_path, capsys):
    detections.detect(tmp_path, "--epochs=0", "--draw=0")
    changed = ["--resume=auto", "--lr=0.5", "--train-images=12", "--set=features=48", "--draw=1"]
    assert detections.main([*detections.TINY, "--epochs=0", f"--out={tmp_path}", *changed]) == 1
    said = capsys.readouterr().err
    assert "--lr: 0.003 in the checkpoint, 0.5 now" in said
    assert "--train-images: 8 in the checkpoint, 12 now" in said
    assert "features: 24 in the checkpoint, 48 now" in said and "--draw" not in said


def test_checkpoints_keep_their_format(trained, tmp_path):
    """Of version 2, which older checkpoints have: what is in them, and the names of options."""
    ours, theirs = checkpoint(trained), checkpoint(detections.detect(tmp_path, "--epochs=0"))
    shared = {"version", "options", "data", "step", "seconds", "model", "optimizer", "generators"}
    assert ours.keys() == shared | {"losses", "ema", "scaler"}
    assert theirs.keys() == shared | {"cpu_seconds", "trained_seconds"}
    assert ours["version"] == theirs["version"] == 2
    assert {"lr", "settings", "warmup_epochs"} <= ours["options"].keys()
    assert {"--lr", "--set features", "--warmup-steps", "--data"} <= theirs["options"].keys()
    assert not {"out", "workers"} & ours["options"].keys()


def test_a_finished_run_is_only_tested_again(trained, capsys):
    curve = losses(trained)
    train(trained, *DRAWING, "--resume=auto")
    assert "test accuracy" in capsys.readouterr().out.splitlines()[-1]
    assert checkpoint(trained)["step"] == trainings.STEPS and losses(trained) == curve


@BOTH
def test_a_run_is_not_overwritten(command, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").touch()
    assert command.main([*command.TINY, f"--out={tmp_path}"]) == 1
    assert "--out must be a new folder without --resume auto" in capsys.readouterr().err


@BOTH
@pytest.mark.parametrize("content", ["bytes", "list", "version"])
def test_a_damaged_checkpoint_is_named(command, content, tmp_path, capsys):
    (path := tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 nothing more")
    if content != "bytes":
        torch.save([1, 2] if content == "list" else {"version": 1, "step": 0}, path)
    assert command.main([*command.TINY, f"--out={tmp_path}", "--resume=auto"]) == 1
    said = capsys.readouterr().err
    if content == "version":
        assert "--resume: expected a checkpoint of version 2 of this command, got 1 with" in said
    else:
        assert f"--resume: {path} is damaged" in said and "start anew in another --out" in said


@BOTH
def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path, capsys):
    wild = ["--lr=1e30", "--clip-grad=0", "--log-every=2", EVERY_STEP]
    assert command.main([*command.TINY, f"--out={tmp_path}", *wild]) == 1
    said, kept = capsys.readouterr().err, checkpoint(tmp_path)
    assert f"in step {kept['step'] + 1} (epoch 1), learning rate " in said
    assert f"last good checkpoint: {tmp_path}/checkpoint.pt of step {kept['step']}" in said
    assert all(t.isfinite().all() for t in kept["model"].values())


def test_moved_images_are_the_same_and_weights_to_start_from_may_be_gone(tmp_path, capsys):
    data = trainings.write_images(tmp_path / "data", each=20)
    few, weights = trainings.FEW, tmp_path / "start" / "weights.safetensors"
    assert trainings.main([*few, "--epochs=0", f"--data={data}", f"--out={weights.parent}"]) == 0
    options = [*few, f"--out={tmp_path / 'run'}", f"--checkpoint={weights}", "--resume=auto"]
    assert trainings.main([*options, f"--data={data}"]) == 0
    weights.unlink()
    moved = data.rename(tmp_path / "moved")
    assert trainings.main([*options, f"--data={moved}/"]) == 0
    next(moved.glob("cat/*.png")).rename(moved / "cat" / "other.png")
    assert trainings.main([*options, f"--data={moved}/"]) == 1
    assert "training images: " in capsys.readouterr().err
