"""Runs of `python -m revbifpn_kernels.detect` that take a second."""

from pathlib import Path

import pytest

pytest.importorskip("pycocotools", reason="an extra")
pytest.importorskip("torchvision", reason="an extra")
from trainings import NUMBERS

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import data, options, state

MODEL = [
    *(f"--set={name}={value}" for name, value in NUMBERS.items() if name != "in_chans"),
    "--out-channels=16",
]
FEW = [
    *MODEL,
    *("--image-size=64", "--batch-size=4", "--epochs=2"),
    *("--warmup-steps=1", "--no-progress", "--draw=2", "--device=cpu", "--threads=1"),
]
# 2 steps per epoch of scenes with digits.
TINY = [*FEW, "--train-images=8", "--val-images=2"]
STEPS = 4


def detect(out: Path, *arguments: str) -> Path:
    """A run to its end in this process; the folder it wrote."""
    has_data = any(argument.startswith("--data") for argument in arguments)
    assert main([*(FEW if has_data else TINY), f"--out={out}", *arguments]) == 0
    return out


def prepared(*arguments: str) -> tuple[options.Options, data.Data]:
    chosen = options.parse(arguments)
    return chosen, data.prepare(chosen)


def begun(*arguments: str) -> tuple[state.DetectorState, data.Data]:
    """A run before its first step, and its data."""
    chosen, found = prepared(*arguments)
    return state.start(chosen, found), found


def write_digits(folder: Path) -> Path:
    assert main([*TINY, f"--write={folder}"]) == 0
    return folder
