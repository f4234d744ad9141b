"""Runs of `python -m revbifpn_kernels.detect` that are over in a second or two."""

from pathlib import Path

from trainings import NUMBERS

from revbifpn_kernels.detect import main

MODEL = [
    *(f"--set={name}={value}" for name, value in NUMBERS.items() if name != "in_chans"),
    "--out-channels=16",
]
# 2 steps an epoch of the digits.
FEW = [
    *MODEL,
    *("--image-size=64", "--batch-size=4", "--epochs=2"),
    *("--warmup-steps=1", "--no-progress", "--draw=2", "--threads=1"),
]
TINY = [*FEW, "--train-images=8", "--val-images=4"]
STEPS = 4


def detect(out: Path, *arguments: str) -> Path:
    """A run to its end in this process; the folder it wrote."""
    has_data = any(argument.startswith("--data") for argument in arguments)
    assert main([*(FEW if has_data else TINY), f"--out={out}", *arguments]) == 0
    return out


def said(capsys) -> tuple[str, str]:
    out, err = capsys.readouterr()
    return out, err


def write_digits(folder: Path) -> Path:
    assert main([*TINY, f"--write={folder}"]) == 0
    return folder
