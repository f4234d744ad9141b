"""Runs of `python -m revbifpn_kernels.train` that take a second, and what runs leave behind."""

import csv
import errno
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from PIL import Image
from tiny import TWO_LEVELS

from revbifpn_kernels.recipes.classify import data
from revbifpn_kernels.recipes.run import clock
from revbifpn_kernels.train import main

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = TWO_LEVELS | {"in_chans": 1, "features": 24, "extra_silos": 0}
MODEL = ["--model=revbifpn_s0", *(f"--set={name}={value}" for name, value in NUMBERS.items())]
# 4 steps per epoch of the 140 training images that `few_digits` leaves.
TINY = [
    *MODEL,
    *("--image-size=32", "--batch-size=32", "--epochs=2", "--warmup-epochs=0.5"),
    *("--device=cpu", "--threads=1", "--workers=0"),
    *("--augment=none", "--no-progress", "--no-tensorboard"),
]
STEPS = 8
# Of a folder with few images: 4 steps per epoch of two classes of 20.
FEW = [*TINY, "--batch-size=8", "--set=in_chans=3"]
EVERY_STEP = "--checkpoint-minutes=0"
TIMEOUT = 1800  # seconds, against tests that hang


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing catches it."""


def few_digits(**options):
    """The first 200 of scikit-learn's 1797 digits."""
    return tuple(values[:200] for values in sklearn.datasets.load_digits(return_X_y=True))


def train(out: Path, *arguments: str) -> Path:
    """A run to its end in this process; the folder it wrote."""
    assert main([*TINY, f"--out={out}", *arguments]) == 0
    return out


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def after_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Calls `action` when a run has made so many steps, before anything of the last is saved."""
    tick = clock.Clock.tick

    def ticking(self, is_training):
        tick(self, is_training)
        if is_training and self.run.step == step:
            action()

    patch.setattr(clock.Clock, "tick", ticking)


class FakeTime:
    """Replaces the clock of the recipes: a step takes a second, nothing else takes time."""

    def __init__(self, patch: pytest.MonkeyPatch, loop: type) -> None:
        self.seconds = 0.0
        patch.setattr(clock, "now", lambda: self.seconds)
        patch.setattr(clock, "cpu_now", lambda: self.seconds / 2)
        advance = loop.advance

        def advancing(self_loop):
            self.seconds += 1
            return advance(self_loop)

        patch.setattr(loop, "advance", advancing)


def started(
    *arguments: str, signalled: tuple[int, int] | None = None, **environment: str
) -> multiprocessing.Process:
    """A run in a process of its own, which may send itself a signal after a step."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainings", "revbifpn_kernels.recipes.classify.session"])
    called = ([*TINY, *arguments], signalled, environment)
    process = context.Process(target=_exit_with, args=called)
    process.start()
    return process


def _exit_with(arguments: list[str], signalled, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    data.load_digits = few_digits
    if signalled:
        kind, step = signalled
        after_step(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), kind))
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def pair(*arguments: str, signalled: tuple[int, int] | None = None) -> list:
    """A run on two processes, as torchrun starts them; a signal goes to the second."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        started(*arguments, RANK=rank, LOCAL_RANK=rank, signalled=kind, **shared)
        for rank, kind in (("0", None), ("1", signalled))
    ]


def ended(*processes: multiprocessing.Process) -> list[int]:
    for process in processes:
        process.join(TIMEOUT)
    return [process.exitcode for process in processes]


def fill_disk(patch: pytest.MonkeyPatch, module, writes: int = 0) -> None:
    """Lets a module write so many files, and then find the disk full."""
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
    """Weights, statistics, averages, the optimizer's state and rows of losses: bit for bit."""
    one, other = checkpoint(left), checkpoint(right)
    assert one["step"] == other["step"]
    for part in one.keys() & {"model", "ema", "optimizer"}:
        _assert_same(one[part], other[part], part)
    assert losses(left) == losses(right)


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


def write_images(folder: Path, classes=("cat", "dog"), each: int = 6, side: int = 40) -> Path:
    """Random images, bright ones of the last class."""
    generator = torch.Generator().manual_seed(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for n in range(each):
            pixels = torch.randint(0, 128, (side, side + n, 3), generator=generator) + 100 * k
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{n}.png")
    return folder
