"""What ends a run besides its last step: errors beside loaders, signals, optimizers that forget."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from trainings import (
    FEW,
    ROOT,
    TIMEOUT,
    TINY,
    after_step,
    checkpoint,
    rows,
    terminate,
    write_images,
)

from revbifpn_kernels.recipes.classify import evaluate
from revbifpn_kernels.recipes.run import session
from revbifpn_kernels.recipes.run.errors import RunError
from revbifpn_kernels.train import main

OUT_OF_MEMORY = """
def advance(loop):
    next(loop.batches)
    raise torch.OutOfMemoryError("of the test")
loop.ClassifierLoop.advance = advance
"""
# Tells that the first validation has begun, and goes on when a line comes back.
PAUSED_VALIDATION = """
evaluate_now = evaluate.evaluate
def evaluate_after_a_line(*arguments):
    print("validating", flush=True)
    sys.stdin.readline()
    return evaluate_now(*arguments)
evaluate.evaluate = evaluate_after_a_line
"""


def launched(change: str, *arguments: str) -> subprocess.Popen:
    """The command in a session of its own, as from a shell, with something replaced in it."""
    script = (
        "import sys, torch\n"
        "from revbifpn_kernels.recipes.classify import evaluate, loop\n"
        f"{change}\nfrom revbifpn_kernels.train import main\nsys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *FEW, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_an_error_ends_the_processes_that_load_images(images, tmp_path):
    process = launched(
        OUT_OF_MEMORY, f"--data={images}", f"--out={tmp_path / 'run'}", "--workers=2"
    )
    _, said = process.communicate(timeout=TIMEOUT)  # they used to be waited for, for ever
    assert process.returncode == 1
    assert said.rstrip().endswith("OutOfMemoryError: of the test")


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_a_validation_with_a_checkpoint(images, tmp_path):
    out = tmp_path / "run"
    options = (f"--data={images}", f"--out={out}", "--workers=1", "--resume=auto")
    process = launched(PAUSED_VALIDATION, *options)
    while process.stdout.readline() != "validating\n":
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate("go on\n", timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 4 of 8" in said and checkpoint(out)["step"] == 4
    assert rows(out / "epochs.csv") == []
    assert main([*FEW, *options]) == 0
    assert [row["step"] for row in rows(out / "epochs.csv")] == ["4", "8"]


def test_a_signal_in_a_validation_ends_the_run_and_the_validation_is_made_up_for(
    tmp_path, monkeypatch
):
    options = [*TINY, f"--out={tmp_path}", "--resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "loader", lambda *views, **rest: stopping())
        assert main(options) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path)["step"] == 4 and rows(tmp_path / "epochs.csv") == []
    assert main(options) == 0
    assert [row["step"] for row in rows(tmp_path / "epochs.csv")] == ["4", "8"]


def stopping():
    """Batches of an evaluation, before the first of which a signal comes."""
    terminate()
    yield torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64), ()


def test_what_a_loading_process_cannot_do_is_said_in_a_line(tmp_path, capsys):
    folder = write_images(tmp_path / "data", each=20)
    for file in folder.glob("*/*.png"):
        file.write_text("no image")
    assert main([*FEW, f"--data={folder}", f"--out={tmp_path / 'run'}", "--workers=1"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("train: --data must be readable, got 32 bad files")
    assert "Traceback" not in said


def test_processes_that_see_other_checkpoints_do_not_train():
    def run(*seen: str):
        world = SimpleNamespace(gathered=lambda own: [own, *seen])
        return SimpleNamespace(world=world, digest="abc")

    session.check_processes_agree(run("a checkpoint of step 4, abc"), {"step": 4})
    with pytest.raises(RunError, match="process 0: no checkpoint, abc; process 1: a checkpoint"):
        session.check_processes_agree(run("a checkpoint of step 4, abc"), None)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lamb", "adan", "adafactor"])
def test_optimizers_that_go_on(name, tmp_path, monkeypatch):
    options = [*TINY, f"--opt={name}", "--epochs=1", f"--out={tmp_path}", "--resume=auto"]
    with monkeypatch.context() as patch:
        after_step(patch, 2, terminate)
        assert main(options) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path)["optimizer"]["state"]
    assert main(options) == 0 and checkpoint(tmp_path)["step"] == 4


@pytest.mark.parametrize("name", ["lookahead_sgd", "madgrad", "adafactorbv", "adahessian"])
def test_optimizers_that_a_checkpoint_does_not_hold(name, capsys, tmp_path):
    assert main([*TINY, f"--opt={name}", f"--out={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert "--opt must go on from a checkpoint as if it had not stopped" in said
    assert name in said and not (tmp_path / "run").exists()


def test_gradients_that_always_overflow_end_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 2.0**-20)
    assert main([*TINY, "--amp=float16", f"--out={tmp_path}"]) == 1
    assert "expected gradients that float16 holds, got an overflow" in capsys.readouterr().err
    assert rows(tmp_path / "steps.csv") == []


def test_a_loss_that_is_not_finite_is_named_before_the_overflow(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 2.0**-20)
    assert main([*TINY, "--amp=float16", "--lr=1e30", f"--out={tmp_path}"]) == 1
    assert "expected a finite loss, got " in capsys.readouterr().err
