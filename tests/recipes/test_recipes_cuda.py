"""Both commands on a GPU: the first loss of a CPU, half precision, a run that goes on."""

import signal

import detections
import pytest
import torch
import trainings
from trainings import after_step, checkpoint, losses, terminate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BOTH = pytest.mark.parametrize("command", [trainings, detections], ids=["train", "detect"])
ON_GPU = "--device=cuda"


def assert_finite(out) -> None:
    assert all(t.isfinite().all() for t in checkpoint(out)["model"].values())


@BOTH
def test_the_first_loss_is_that_of_a_cpu(command, tmp_path):
    found = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        options = "--log-every=1", "--epochs=1", f"--device={device}", f"--out={out}"
        assert command.main([*command.TINY, *options]) == 0
        assert_finite(out)
        found[device] = losses(out)
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-3)
    assert len(found["cuda"]) == len(found["cpu"]) > 1


@BOTH
def test_a_run_in_half_precision_goes_on(command, tmp_path, monkeypatch):
    options = ON_GPU, "--amp=bfloat16", "--lattice=2^-12", f"--out={tmp_path}", "--resume=auto"
    with monkeypatch.context() as patch:
        after_step(patch, 1, terminate)
        assert command.main([*command.TINY, *options]) == 128 + signal.SIGTERM
    assert command.main([*command.TINY, *options]) == 0
    assert checkpoint(tmp_path)["step"] == command.STEPS
    assert_finite(tmp_path)
