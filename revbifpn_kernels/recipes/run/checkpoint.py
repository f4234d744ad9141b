"""Files that are whole or absent, and the states of random number generators."""

import contextlib
import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions

from . import clock
from .errors import RunError

NAME = "checkpoint.pt"
# Whole tensors on the CPU, under the bare model's names, also where they are sharded.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{option} must be a folder to write to, got {path}: {error}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file: at each moment, also after a power cut, the old or the new one is there.

    Raises `OSError` if the disk is full or gone; then the old file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every file system syncs the rename itself
        os.fsync(folder)
    os.close(folder)


def save(path: Path, content: dict[str, Any]) -> None:
    # In memory first: PyTorch's own writer turns a full disk into an error without a number.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any] | None:
    """Returns the content, None without a file. Nothing in it is executed."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"expected a dict, got {type(content).__name__}")
        return content
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"--resume: {path} is damaged ({type(error).__name__}: {reason}); "
            "start anew in another --out"
        ) from error


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Keeper:
    """Writes a run's checkpoint when it is due; if that fails, the old one stays.

    Each process must call `save`; the first one writes. `report` is the run's `Console`.
    """

    def __init__(self, report) -> None:
        self.run, self.warn, self.path = report.run, report.warn, report.out / NAME
        self.interval = 60 * self.run.options.checkpoint_minutes
        self.last_time = clock.now()
        # The step of the file.
        self.step: int | None = self.run.step if self.path.exists() else None

    @property
    def is_due(self) -> bool:
        return clock.now() - self.last_time >= self.interval

    def save(self) -> None:
        """Writes the state after the last step."""
        content, step = self.run.capture(), self.run.step
        self.last_time = clock.now()
        if self.run.world.is_first:
            try:
                save(self.path, content)
            except OSError as error:
                has_none = self.step is None
                old = "there is none yet" if has_none else f"that of step {self.step} stays"
                self.warn(f"checkpoint of step {step} not written to {self.path}: {error}; {old}")
                return
        self.step = step

    def described(self) -> str:
        return "none" if self.step is None else f"{self.path} of step {self.step}"
