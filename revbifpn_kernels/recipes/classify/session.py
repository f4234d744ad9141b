"""A whole run: put together, trained, tested, written down."""

import itertools
import os
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.data import DataLoader

from ...models.cost import training_memory
from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from ..run import checkpoint
from ..run.order import Parts
from ..run.processes import World, joined
from ..run.signals import Signals, ignore_signals
from . import augment, data, evaluate, loop, networks, state
from .optimizers import refuse_forgetful
from .options import Options, TrainError
from .report import MIB, Report
from .state import Run

WEIGHTS = "weights.safetensors"


def main(options: Options) -> int:
    """Train as asked; 0 if the last step was reached, 128 + the signal if one came before."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.memory:
        refuse_forgetful(options)
    with joined(options) as world:
        found, config, side = prepare(options)
        if options.memory:
            if world.is_first:
                print_memory(options, config, side)
            return 0
        if options.export is not None:
            from .export import prepare_folder

            prepare_folder(Path(options.export))  # what is missing is told before the training
        out = _out(options, world)
        run = _begun(options, world, config, found, out / checkpoint.NAME)
        keeper = checkpoint.Keeper(
            out,
            options.checkpoint_minutes,
            lambda text: report.warn(text),
            lambda: state.capture(run),
            world.is_first,
        )
        if keeper.path.exists():
            keeper.step = run.step
        report = Report(run, out)
        with Signals() as signals:
            is_complete = _train(run, found, side, report, keeper, signals)
        if not is_complete:
            return report.stopped(signals.received, keeper)
        return 0


def prepare(options: Options) -> tuple[data.Data, Config, int]:
    """Data, the model's numbers and the side of images, which depend on each other."""
    config = networks.config(options, 1)
    side = options.image_size or config.resolution
    if options.data is None:
        found = data.digits(config.in_chans, side, options.split_seed)
    else:
        found = data.folder(options.data, config.in_chans, side, options.split_seed)
    return found, networks.config(options, len(found.classes)), side


def _out(options: Options, world: World) -> Path:
    """The run's folder, the same on all ranks; a run that is in it already is not overwritten."""
    name = Path(options.data).resolve().name if options.data else "digits"
    out = Path(world.gathered(options.out or new_folder(f"runs/{name}-"))[0])
    refuse_used(out, options.resume)
    checkpoint.make_folder("--out", out)
    world.any(False)  # no rank writes there before all have looked
    return out


def refuse_used(out: Path, resume: str, error: type[TrainError] = TrainError) -> None:
    """Raise `error` where a run has left something, and this one is not to continue it."""
    found = [name for name in (checkpoint.NAME, WEIGHTS) if (out / name).exists()]
    if found and resume == "never":
        raise error(
            f"{error.command}: --out must be a new folder without --resume auto, got {out} with "
            f"{found[0]}"
        )


def new_folder(start: str) -> str:
    """With the time, and a number if another run began in the same second."""
    stem = start + time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([stem], (f"{stem}-{k}" for k in itertools.count(2)))
    return next(name for name in names if not os.path.exists(name))


def _begun(options: Options, world: World, config: Config, found: data.Data, path: Path) -> Run:
    """The run that a checkpoint is of, or a new one. The file's content is not kept."""
    content = checkpoint.load(path)
    run = state.start(options, world, config, found, is_new=content is None)
    _agree(run, content)
    if content is not None:
        state.restore(run, content)
    return run


def _agree(run: Run, content: dict | None) -> None:
    """Raise where processes would go on from different states, or on different images."""
    step = "no checkpoint" if content is None else f"a checkpoint of step {content.get('step')}"
    seen = run.world.gathered(f"{step}, {run.digest}")
    if len(set(seen)) > 1:
        listed = "; ".join(f"process {rank}: {what}" for rank, what in enumerate(seen))
        raise TrainError(
            "train: --out and --data must be the same folders for every process, got " + listed
        )


def _train(run: Run, found: data.Data, side: int, report: Report, keeper, signals) -> bool:
    options, mode = run.options, data.MODES[run.config.in_chans]
    transform = augment.for_evaluation(options, mode, side)
    blank = torch.zeros(run.config.in_chans, side, side)
    val, test = (data.Evaluation(part, transform, blank) for part in (found.val, found.test))
    report.say(
        f"{len(found.train.labels)} images to train on, {len(val)} to validate, {len(test)} to "
        f"test{' (the same)' if found.test is found.val else ''}, {len(found.classes)} classes; "
        f"{sum(p.numel() for p in run.model.parameters()):,} parameters; from step {run.step} of "
        f"{run.steps}"
    )
    report.skip(found.skipped)
    is_complete = loop.train(
        run,
        iter(_batches(run, found, mode, side)),
        lambda: evaluate.evaluate(run.result, val, options, run.world, signals),
        report,
        keeper,
        signals,
    )
    score = is_complete and evaluate.evaluate(run.result, test, options, run.world, signals)
    if score:
        report.skip(score.skipped)
        try:
            write_result(run, found.classes, test, report)
        finally:
            report.finish(score)  # also if the disk is full, or the export refused
    return bool(score)


def _batches(run: Run, found: data.Data, mode: str, side: int) -> DataLoader:
    """All parts of all steps that are left."""
    options, world = run.options, run.world
    order = Parts(run.order, run.step, run.steps, options.accumulate, world.rank, world.size)
    views = data.Training(found.train, augment.for_training(options, mode, side), options.seed)
    return DataLoader(
        views,
        batch_sampler=order,
        collate_fn=augment.Collate(len(found.classes), options.mixup, options.cutmix),
        num_workers=options.workers,
        worker_init_fn=ignore_signals,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # not the global one, whose state is part of the run
    )


def write_result(run: Run, classes: list[str], test: data.Evaluation, report: Report) -> None:
    """The weights that were tested, and what is to be exported."""
    weights = state.get_model_state_dict(run.result, options=checkpoint.WHOLE)
    if not run.world.is_first:
        return
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    path = report.out / WEIGHTS
    try:
        about = {networks.MADE_WITH: networks.model_options(run.options)}
        checkpoint.write_atomically(path, safetensors.torch.save(tensors, about))
    except OSError as error:
        raise TrainError(
            f"train: {path} not written: {error}; the run is kept in {report.out}: make room and "
            "run again with --resume auto"
        ) from error
    if run.options.export is not None:
        from .export import export

        network = RevBiFPN(run.config)
        network.load_state_dict(weights)
        report.say(export(network, Path(run.options.export), test, classes))


def print_memory(options: Options, config: Config, side: int) -> None:
    """What a step takes on top of weights, gradients and optimizer, counted on fake tensors."""
    dtype = None if options.amp == "none" else getattr(torch, options.amp)
    print(f"{'images':>6}{'mode':>14}{'held MiB':>12}{'peak MiB':>12}")
    for images in (2, 16):
        for reversible in (True, False):
            model = RevBiFPN(config, reversible=reversible)
            shape = (images, config.in_chans, side, side)
            held, peak = (n / MIB for n in training_memory(model, shape, autocast=dtype))
            name = "reversible" if reversible else "stored"
            print(f"{images:6}{name:>14}{held:12.1f}{peak:12.1f}")
    sys.stdout.flush()
