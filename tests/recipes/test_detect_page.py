"""The page of `revbifpn_kernels.detect`: its commands run, its memory is what steps allocate."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from detections import FEW, MODEL, TINY, detect, write_digits
from trainings import ROOT

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import memory, networks, options

PAGE = ROOT / "docs" / "detection.md"


def test_memory_is_counted_as_a_real_step_allocates():
    from benchmarks.lib.memory import held_and_peak

    rows_of = {}
    for mode in ("--reversible", "--no-reversible"):
        model = networks.backbone(options.parse([*TINY, mode])).train()
        rows_of[mode] = memory.measured(model, 64, None)
        real = []
        for images in memory.BATCHES:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            batch = torch.rand(images, 3, 64, 64)
            real.append(held_and_peak(lambda b=batch, m=model: sum(x.sum() for x in m(b).values())))
        share = (real[1][0] - real[0][0]) / 2 / memory.MIB
        assert abs(rows_of[mode].held - share) < 0.1 * share
    assert rows_of["--no-reversible"].held > 2 * rows_of["--reversible"].held


def commands() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if "python -m revbifpn_kernels.detect " in line[:40]]


def test_the_lines_of_python_of_the_page_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    detect(Path("runs/digits"))
    chosen = options.parse(TINY)
    monkeypatch.setattr(options, "parse", lambda arguments: chosen)
    exec(code, {})
    assert "tensor(" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_page_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command, comments=True)[3:]
    if "--write" not in arguments:
        write_digits(tmp_path / "digits-as-coco")
    if "--memory" in arguments:
        monkeypatch.setattr(memory, "SHOWN", ())
        for name in ("_resnet50_fpn", "_hrnet_w18"):
            monkeypatch.setattr(memory, name, lambda *numbers: torch.nn.Conv2d(3, 4, 3))
    shrunk = [*MODEL, "--image-size=64"]
    if "--memory" not in arguments:
        shrunk = FEW if "--data" in arguments else TINY
    assert main([*arguments, *shrunk, "--no-progress"]) == 0
    assert "ResNet-50-FPN" in capsys.readouterr().out or "--memory" not in arguments
