"""A whole run: put together, trained, measured, written down."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..classify.session import new_folder, refuse_used
from ..run import checkpoint
from ..run.order import Parts
from ..run.signals import Signals, ignore_signals
from . import data, draw, evaluate, loop, networks, scenes
from . import run as runs
from .options import DetectError, Options
from .report import Report
from .run import Run


def main(options: Options) -> int:
    """Train as asked; 0 if the end was reached, 128 + the signal if one came before."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory:
        from .memory import print_table

        print_table(options)
        return 0
    if options.write is not None:
        scenes.write(Path(options.write), dict(zip(data.PARTS, data.digits(options), strict=True)))
        return 0
    found = data.prepare(options)
    out = _out(options)
    run = _begun(options, found, out / checkpoint.NAME)
    keeper = checkpoint.Keeper(
        out, options.checkpoint_minutes, lambda text: report.warn(text), lambda: runs.capture(run)
    )
    if keeper.path.exists():
        keeper.step = run.step
    report = Report(run, out)
    with Signals() as signals:
        is_complete = _train(run, found, report, keeper, signals)
    if is_complete:
        return 0
    return report.stopped(signals.received, keeper)


def _begun(options: Options, found: data.Data, path: Path) -> Run:
    """The run that a checkpoint is of, or a new one. The file's content is not kept."""
    run = runs.start(options, found)
    content = checkpoint.load(path)
    if content is not None:
        runs.restore(run, content)
    return run


def _out(options: Options) -> Path:
    """The run's folder; a run that is in it already is not overwritten."""
    name = Path(options.data).resolve().name if options.data else "digits"
    out = Path(options.out or new_folder(f"runs/detect-{name}-"))
    refuse_used(out, options.resume, DetectError)
    checkpoint.make_folder("--out", out, DetectError)
    return out


def _train(run: Run, found: data.Data, report: Report, keeper, signals: Signals) -> bool:
    report.say(
        f"{len(found.train)} images an epoch to train on, {len(found.val)} to measure on, "
        f"{len(found.classes)} classes; {networks.parameters(run.model):,} parameters; "
        f"{torch.get_num_threads()} threads; from step {run.step} of {run.steps}"
    )
    report.skip(found.skipped)
    batches = iter(_batches(run, found))

    clock = loop.Clock(run)

    def measure() -> evaluate.Result | None:
        result = evaluate.evaluate(run, found, signals)
        clock.tick(is_training=False)
        if result is not None:
            report.score(result)
        return result

    result = loop.train(run, batches, measure, clock, report, keeper, signals) and measure()
    if not result:
        return False
    if run.options.draw:
        picture = draw.grid(found, result.found, run.options.draw)
        report.write(lambda: checkpoint.write_atomically(report.out / draw.NAME, picture))
    report.finish(result)
    return True


def _batches(run: Run, found: data.Data) -> DataLoader:
    """All batches that are left."""
    return DataLoader(
        data.Training(found.train, run.options),
        batch_sampler=Parts(run.order, run.step, run.steps),
        collate_fn=data.collate,
        num_workers=run.options.workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # not the global one, whose state is part of the run
    )
