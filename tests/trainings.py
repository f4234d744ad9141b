"""Runs of `python -m revbifpn_kernels.train` that are over in a second or two, and their files."""

import csv
import errno
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tiny import TWO_LEVELS

from revbifpn_kernels.train import main

NUMBERS = TWO_LEVELS | {"in_chans": 1, "features": 24, "extra_silos": 0}
MODEL = ["--model=revbifpn_s0", *(f"--set={name}={value}" for name, value in NUMBERS.items())]
# 4 steps an epoch of the digits' 1259 training images.
TINY = [
    *MODEL,
    *("--image-size=32", "--batch-size=256", "--epochs=2", "--warmup-epochs=0.5"),
    *("--augment=none", "--workers=0", "--no-progress", "--no-tensorboard", "--threads=1"),
]
STEPS = 8
# Of a folder with few pictures.
FEW = [*TINY, "--batch-size=8", "--set=in_chans=3"]


def train(out: Path, *arguments: str) -> Path:
    """A run to its end in this process; the folder it wrote."""
    assert main([*TINY, f"--out={out}", *arguments]) == 0
    return out


def started(*arguments: str, **environment: str) -> multiprocessing.Process:
    """A run in a process of its own, which begins at once: the libraries are loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["revbifpn_kernels.recipes.classify.session"])
    process = context.Process(target=_exit_with, args=([*TINY, *arguments], environment))
    process.start()
    return process


def _exit_with(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def finished(*arguments: str) -> int:
    process = started(*arguments)
    process.join(120)
    return process.exitcode


def pair(*arguments: str) -> list[multiprocessing.Process]:
    """A run on two processes, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [started(*arguments, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]


def ended(processes: list[multiprocessing.Process]) -> list[int]:
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def wait_for_step(out: Path, step: int) -> None:
    """Until steps.csv tells of it."""
    deadline = time.monotonic() + 90
    while not (out / "steps.csv").exists() or len(rows(out / "steps.csv")) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def fill_disk(patch, module, writes: int = 0) -> None:
    """Let a module write so many files, and then find the disk full."""
    write, written = module.write_atomically, []

    def full(path, content):
        if len(written) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        write(path, content)

    patch.setattr(module, "write_atomically", full)


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(left: Path, right: Path) -> None:
    """Weights, statistics, averages, the optimizer's state: bit for bit."""
    one, other = checkpoint(left), checkpoint(right)
    assert one["step"] == other["step"]
    for part in ("model", "ema", "optimizer"):
        _assert_same(one[part], other[part], part)


def _assert_same(one, other, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{where}.{k}")
    else:
        assert one == other, where


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(out / "steps.csv")]


def write_pictures(folder: Path, classes=("cat", "dog"), each: int = 6, side: int = 40) -> Path:
    """Random pictures, bright ones of the last class."""
    generator = torch.Generator().manual_seed(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for n in range(each):
            pixels = torch.randint(0, 128, (side, side + n, 3), generator=generator) + 100 * k
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{n}.png")
    return folder
