"""The folder of a run, how a run begins, and how it ends."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import checkpoint
from .console import Console
from .errors import RunError
from .options import RunOptions
from .processes import World
from .signals import Signals
from .state import RunState

WEIGHTS = "weights.safetensors"


def folder_of(options: RunOptions, world: World, prefix: str = "") -> Path:
    """The run's folder, the same for all processes; raises if it has a run not to be resumed."""
    name = Path(options.data).resolve().name if options.data else "digits"
    out = Path(world.gathered(options.out or _new_folder(f"runs/{prefix}{name}-"))[0])
    found = [name for name in (checkpoint.NAME, WEIGHTS) if (out / name).exists()]
    if found and options.resume == "never":
        raise RunError(
            f"--out must be a new folder without --resume auto, got {out} with {found[0]}"
        )
    checkpoint.make_folder("--out", out)
    world.any(False)  # no process writes there before all have looked
    return out


def _new_folder(start: str) -> str:
    """With the time, and a number if another run began in the same second."""
    stem = start + time.strftime("%Y%m%d-%H%M%S")
    candidates = itertools.chain([stem], (f"{stem}-{k}" for k in itertools.count(2)))
    return next(name for name in candidates if not os.path.exists(name))


def start_or_resume(out: Path, start: Callable[[bool], RunState]) -> RunState:
    """The run restored from a folder's checkpoint, or a new one.

    `start` makes a run at step 0; its argument is False if a checkpoint is restored afterwards.
    """
    content = checkpoint.load(out / checkpoint.NAME)
    run = start(content is None)
    check_processes_agree(run, content)
    if content is not None:
        run.restore(content)
    return run


def check_processes_agree(run: RunState, content: dict | None) -> None:
    """Raises if processes would continue from different steps, or on different images."""
    step = "no checkpoint" if content is None else f"a checkpoint of step {content.get('step')}"
    seen = run.world.gathered(f"{step}, {run.digest}")
    if len(set(seen)) > 1:
        listed = "; ".join(f"process {rank}: {what}" for rank, what in enumerate(seen))
        raise RunError("--out and --data must be the same folders for every process, got " + listed)


def train_until_end(report: Console, train: Callable[[checkpoint.Keeper, Signals], bool]) -> int:
    """Trains; returns 0 if the end was reached, 128 + the signal if one came before."""
    keeper = checkpoint.Keeper(report)
    with Signals() as signals:
        is_complete = train(keeper, signals)
    return 0 if is_complete else report.stopped(signals.received, keeper)
