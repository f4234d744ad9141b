"""What ends a run of `revbifpn_kernels.detect`, what it leaves, and how it goes on."""

import os
import signal
import threading
import time

import pytest
import torch

pytest.importorskip("pycocotools", reason="an extra")
pytest.importorskip("torchvision", reason="an extra")
from detections import STEPS, TINY, detect, said
from trainings import checkpoint, fill_disk, rows

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import evaluate
from revbifpn_kernels.recipes.run import checkpoint as files

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*not found to be deterministic|.*does not have a determin"),
]


def test_a_signal_ends_a_run_and_nothing_is_lost(tmp_path, capsys):
    whole = detect(tmp_path / "whole", "--epochs=4", "--log-every=1")
    out = tmp_path / "stopped"

    def stop():
        while not (out / "steps.csv").exists() or len(rows(out / "steps.csv")) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    arguments = [*TINY, "--epochs=4", "--log-every=1", f"--out={out}", "--resume=auto"]
    assert main(arguments) == 128 + signal.SIGTERM
    assert f"continue with --out {out} --resume auto" in said(capsys)[0]
    assert 2 <= checkpoint(out)["step"] < 2 * STEPS
    assert main(arguments) == 0
    one, other = checkpoint(whole), checkpoint(out)
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    tables = [[row["loss"] for row in rows(folder / "steps.csv")] for folder in (whole, out)]
    assert tables[0] == tables[1] and len(tables[0]) == 2 * STEPS


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, files, writes=2)
    detect(tmp_path, "--checkpoint-minutes=0")
    assert "No space left on device; that of step 2 stays" in said(capsys)[1]
    assert checkpoint(tmp_path)["step"] == 2


def test_what_cannot_go_on_is_refused(tmp_path, capsys):
    detect(tmp_path)
    assert main([*TINY, f"--out={tmp_path}"]) == 1
    assert "--out must be a new folder without --resume auto" in said(capsys)[1]
    changed = ["--resume=auto", "--lr=0.5", "--train-images=12", "--set=features=48"]
    assert main([*TINY, f"--out={tmp_path}", *changed]) == 1
    err = said(capsys)[1]
    assert "--lr: 0.003 in the checkpoint, 0.5 now" in err
    assert "--train-images: 8 in the checkpoint, 12 now" in err
    assert "features: 24 in the checkpoint, 48 now" in err
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 nothing more")
    assert main([*TINY, f"--out={tmp_path}", "--resume=auto"]) == 1
    assert said(capsys)[1].startswith(f"detect: --resume: {tmp_path}/checkpoint.pt is damaged")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    wild = ["--lr=1e30", "--clip-grad=0", "--checkpoint-minutes=0", f"--out={tmp_path}"]
    assert main([*TINY, *wild]) == 1
    err = said(capsys)[1]
    assert "expected a finite " in err and "learning rate " in err
    assert f"last good checkpoint: {tmp_path}/checkpoint.pt of step " in err
    assert all(t.isfinite().all() for t in checkpoint(tmp_path)["model"].values())


def test_the_clock_ends_a_run_with_a_learning_rate_of_nearly_0(tmp_path):
    detect(tmp_path, "--epochs=100000", "--minutes=0.05", "--log-every=1", "--lr=1e-3")
    rates = [float(row["lr"]) for row in rows(tmp_path / "steps.csv")]
    assert len(rates) < 1000 and rates[-1] < rates[1] / 2


def scored(out):
    return [int(row["step"]) for row in rows(out / "precision.csv")]


@pytest.mark.parametrize("at, step", [(1, STEPS // 2), (2, STEPS)])
def test_a_signal_in_an_evaluation_ends_the_run_and_the_evaluation_is_made_up_for(
    at, step, tmp_path, monkeypatch, capsys
):
    keep, seen = evaluate._kept, []

    def signalled(*arguments):
        seen.append(arguments)
        if len(seen) == 2 * at:  # of two images
            os.kill(os.getpid(), signal.SIGTERM)
        return keep(*arguments)

    monkeypatch.setattr(evaluate, "_kept", signalled)
    arguments = [*TINY, "--eval-every=1", "--val-images=2", f"--out={tmp_path}", "--resume=auto"]
    assert main(arguments) == 128 + signal.SIGTERM
    out = said(capsys)[0]
    assert f"stopped by SIGTERM after step {step} of {STEPS}; checkpoint: {tmp_path}/" in out
    assert checkpoint(tmp_path)["step"] == step and scored(tmp_path) == [STEPS // 2][: at - 1]
    assert main(arguments) == 0
    assert scored(tmp_path) == [STEPS // 2, STEPS]


def test_what_has_been_measured_is_not_measured_again(tmp_path, monkeypatch):
    measure, steps = evaluate.evaluate, []

    def signalled(run, *others):
        steps.append(run.step)
        result = measure(run, *others)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(evaluate, "evaluate", signalled)
    arguments = [*TINY, "--eval-every=1", f"--out={tmp_path}", "--resume=auto"]
    assert main(arguments) == 128 + signal.SIGTERM and main(arguments) == 0
    assert steps == scored(tmp_path) == [STEPS // 2, STEPS]


def test_a_finished_run_that_is_resumed_has_one_row_a_step(tmp_path):
    for _ in range(2):
        detect(tmp_path, "--eval-every=1", "--resume=auto")
    assert scored(tmp_path) == [STEPS // 2, STEPS]


def test_measuring_is_in_the_seconds_of_rows_and_not_in_the_minutes_of_training(
    tmp_path, monkeypatch
):
    measure = evaluate.precisions

    def slow(*arguments):
        time.sleep(1)
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "precisions", slow)
    detect(tmp_path, "--eval-every=1", "--epochs=4", "--minutes=0.05", "--lr=1e-4")
    found, steps = checkpoint(tmp_path), rows(tmp_path / "steps.csv")
    assert scored(tmp_path) == [2, 4, 6, 8] and found["step"] == 8 == int(steps[-1]["step"])
    seconds = [float(row["seconds"]) for row in rows(tmp_path / "precision.csv")]
    assert seconds[0] > 1 and seconds[3] - found["seconds"] > 0.9
    assert 3 < found["seconds"] and found["trained_seconds"] < found["seconds"] - 2.9


def test_a_run_that_the_clock_ends_keeps_its_last_step(tmp_path):
    detect(tmp_path, "--eval-every=1", "--epochs=100000", "--minutes=0.02", "--lr=1e-4")
    assert checkpoint(tmp_path)["step"] == scored(tmp_path)[-1]
    assert len(set(scored(tmp_path))) == len(scored(tmp_path)) > 1


def test_there_is_a_checkpoint_before_an_evaluation(tmp_path, monkeypatch):
    kept = []

    def measured(run, *others):
        kept.append((run.step, checkpoint(tmp_path)["step"]))
        return measure(run, *others)

    measure = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", measured)
    detect(tmp_path, "--eval-every=1", "--epochs=3")
    assert kept == [(2, 2), (4, 4), (6, 6)]


def test_no_steps_leave_a_checkpoint_too(tmp_path):
    assert checkpoint(detect(tmp_path, "--epochs=0"))["step"] == 0


def test_loaders_of_an_evaluation_change_nothing(tmp_path):
    alone = detect(tmp_path / "alone", "--eval-every=1")
    helped = detect(tmp_path / "helped", "--eval-every=1", "--workers=1")
    one, other = (rows(out / "precision.csv") for out in (alone, helped))
    assert [row["AP50"] for row in one] == [row["AP50"] for row in other]
    one, other = checkpoint(alone), checkpoint(helped)
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
