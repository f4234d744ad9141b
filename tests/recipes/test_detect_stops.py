"""Evaluations amid a training of `revbifpn_kernels.detect`, and the clock that may end it."""

import os
import signal

import pytest
from detections import STEPS, TINY, begun, detect
from trainings import FakeTime, assert_same_run, checkpoint, rows, terminate

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import evaluate
from revbifpn_kernels.recipes.detect.loop import DetectorLoop


def scored(out):
    return [int(row["step"]) for row in rows(out / "precision.csv")]


def test_the_clock_ends_a_run_with_a_learning_rate_of_nearly_0(tmp_path, monkeypatch):
    """A step takes a second, an evaluation an hour, which is no time of training."""
    time = FakeTime(monkeypatch, DetectorLoop)
    measure = evaluate.precisions

    def slow(*arguments):
        time.seconds += 3600
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "precisions", slow)
    options = ("--epochs=100000", "--minutes=0.1", "--log-every=1", "--lr=1e-3", "--eval-every=1")
    detect(tmp_path, *options)
    rates = [float(row["lr"]) for row in rows(tmp_path / "steps.csv")]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-3 * (1 - 0.75**0.5) / 2, rel=1e-4)
    found = checkpoint(tmp_path)
    assert scored(tmp_path) == [2, 4, 6] and found["step"] == 6 and found["trained_seconds"] == 6
    assert found["seconds"] == 6 + 2 * 3600 and found["cpu_seconds"] == 3 + 3600
    seconds = [float(row["seconds"]) for row in rows(tmp_path / "precision.csv")]
    assert seconds == [3602, 7204, 10806]


@pytest.mark.parametrize("at, step", [(1, STEPS // 2), (2, STEPS)])
def test_a_signal_in_an_evaluation_ends_the_run_and_the_evaluation_is_made_up_for(
    at, step, tmp_path, monkeypatch, capsys
):
    scale, seen = evaluate._on_annotated_scale, []

    def signalled(*arguments):
        seen.append(arguments)
        if len(seen) == 2 * at:  # of two images
            terminate()
        return scale(*arguments)

    monkeypatch.setattr(evaluate, "_on_annotated_scale", signalled)
    arguments = [*TINY, "--eval-every=1", f"--out={tmp_path}", "--resume=auto"]
    assert main(arguments) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM after step {step} of {STEPS}; checkpoint: {tmp_path}/" in out
    assert checkpoint(tmp_path)["step"] == step and scored(tmp_path) == [STEPS // 2][: at - 1]
    assert main(arguments) == 0
    assert scored(tmp_path) == [STEPS // 2, STEPS]


def test_what_has_been_measured_is_not_measured_again(tmp_path, monkeypatch):
    """A checkpoint precedes each evaluation, and a finished run has one row per step."""
    measure, steps = evaluate.evaluate, []

    def signalled(run, *others):
        steps.append((run.step, checkpoint(tmp_path)["step"]))
        result = measure(run, *others)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(evaluate, "evaluate", signalled)
    arguments = [*TINY, "--eval-every=1", f"--out={tmp_path}", "--resume=auto"]
    assert main(arguments) == 128 + signal.SIGTERM and main(arguments) == 0
    assert steps == [(STEPS // 2, STEPS // 2), (STEPS, STEPS)]
    assert main(arguments) == 0
    assert scored(tmp_path) == [STEPS // 2, STEPS]


def test_no_steps_leave_a_checkpoint_too(tmp_path):
    assert checkpoint(detect(tmp_path, "--epochs=0"))["step"] == 0


def test_loaders_of_an_evaluation_change_nothing(tmp_path):
    alone = detect(tmp_path / "alone", "--eval-every=1")
    helped = detect(tmp_path / "helped", "--eval-every=1", "--workers=1")
    one, other = (rows(out / "precision.csv") for out in (alone, helped))
    assert [row["AP50"] for row in one] == [row["AP50"] for row in other]
    assert_same_run(alone, helped)


def test_learning_rate_warms_up_and_falls():
    run = begun(*TINY, "--warmup-steps=2", "--lr=0.01")[0]
    rates = []
    for run.step in range(STEPS + 1):
        rates.append(run.lr)
    assert rates == pytest.approx([0.005, 0.01 * 0.8535534, 0.005, 0.01 * 0.1464466, 0], abs=1e-8)


def test_biases_and_norms_do_not_decay():
    run = begun(*TINY)[0]
    decays = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert {(p.dim() > 1, decay) for p, decay in decays.items()} == {(True, 0.05), (False, 0.0)}
    assert decays.keys() == set(run.model.parameters())
