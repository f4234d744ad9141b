"""A whole run of `detect`: sets up, trains, evaluates, writes the results."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..run.checkpoint import write_atomically
from ..run.networks import parameter_count
from ..run.processes import World, device_of
from ..run.samples import training_loader
from ..run.session import folder_of, start_or_resume, train_until_end
from . import data, draw, scenes, state
from .loop import DetectorLoop
from .options import parse
from .report import Report
from .state import DetectorState


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 after the last step, 128 + the signal if one ended it."""
    options = parse(arguments)
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
    out = folder_of(options, World(0, 1, device_of(options.device)), "detect-")
    run = start_or_resume(out, lambda is_new: state.start(options, found))
    report = Report(run, out)
    return train_until_end(report, lambda *control: _train(run, found, report, *control))


def _train(run: DetectorState, found: data.Data, report: Report, keeper, signals) -> bool:
    """Trains and evaluates; returns False if a signal ended it."""
    report.say(
        f"{len(found.train)} images per epoch to train on, {len(found.val)} to measure on, "
        f"{len(found.classes)} classes; {parameter_count(run.model):,} parameters; "
        f"{torch.get_num_threads()} threads; from step {run.step} of {run.steps}"
    )
    report.skip(found.skipped)
    batches = iter(training_loader(run, data.Training(found.train, run.options), data.collate))
    loop = DetectorLoop(batches, report, keeper, signals, data=found)
    result = loop.train() and loop.measure()
    if not result:
        return False
    if run.options.draw:
        figure = draw.grid(found, result.found, run.options.draw)
        report.write(write_atomically, report.out / draw.NAME, figure)
    report.finish(result)
    return True
