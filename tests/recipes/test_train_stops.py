"""What ends a run in the middle: errors beside processes that load images, signals, other ranks."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from trainings import FEW, TINY, checkpoint, rows, write_pictures

from revbifpn_kernels.recipes.classify import session
from revbifpn_kernels.recipes.classify.options import TrainError
from revbifpn_kernels.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
OUT_OF_MEMORY = """
def advance(*arguments):
    raise torch.OutOfMemoryError("of the test")
loop.advance = advance
"""
SLOW_EVALUATION = """
load = data.Evaluation.__getitem__
data.Evaluation.__getitem__ = lambda views, k: time.sleep(0.5) or load(views, k)
"""


def launched(change: str, *arguments: str) -> subprocess.Popen:
    """The command in a session of its own, as from a shell, with something replaced in it."""
    script = "import sys, time, torch\nfrom revbifpn_kernels.train import data, loop\n"
    script += f"{change}\nfrom revbifpn_kernels.train.__main__ import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", script, *FEW, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_an_error_ends_the_processes_that_load_images(tmp_path):
    data = write_pictures(tmp_path / "data", each=20)
    process = launched(OUT_OF_MEMORY, f"--data={data}", f"--out={tmp_path / 'run'}", "--workers=2")
    _, said = process.communicate(timeout=90)  # they used to be waited for, for ever
    assert process.returncode == 1
    assert said.rstrip().endswith("OutOfMemoryError: of the test")


def test_what_a_loading_process_cannot_do_is_said_in_a_line(tmp_path):
    data = write_pictures(tmp_path / "data", each=20)
    for file in (*data.glob("*/*.png"),):
        file.write_text("no picture")
    process = launched("", f"--data={data}", f"--out={tmp_path / 'run'}", "--workers=1")
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("train: --data must be readable, got 32 bad files")


def test_a_signal_to_all_processes_ends_a_validation_with_a_checkpoint(tmp_path):
    data = write_pictures(tmp_path / "data", each=20)
    out = tmp_path / "run"
    options = (f"--data={data}", f"--out={out}", "--workers=1", "--resume=auto")
    process = launched(SLOW_EVALUATION, *options)
    deadline = time.monotonic() + 90
    while not (out / "checkpoint.pt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 4 of 8" in said and checkpoint(out)["step"] == 4
    assert rows(out / "epochs.csv") == []
    assert main([*FEW, *options]) == 0
    assert [row["step"] for row in rows(out / "epochs.csv")] == ["4", "8"]


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path):
    def run(*seen: str):
        world = SimpleNamespace(gathered=lambda own: [own, *seen])
        return SimpleNamespace(world=world, digest="abc")

    session._agree(run("a checkpoint of step 4, abc"), {"step": 4})
    with pytest.raises(TrainError, match="process 0: no checkpoint, abc; process 1: a checkpoint"):
        session._agree(run("a checkpoint of step 4, abc"), None)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lamb", "adan", "adafactor"])
def test_optimizers_that_go_on(name, tmp_path):
    assert main([*TINY, f"--opt={name}", "--epochs=0", f"--out={tmp_path}"]) == 0


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
