"""A whole run of `train`: sets up, trains, tests, writes the results."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ...models.cost import training_memory
from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from ..run import checkpoint
from ..run.errors import RunError
from ..run.networks import MODEL_OPTIONS, dtype_of, parameter_count
from ..run.processes import joined
from ..run.samples import training_loader
from ..run.session import WEIGHTS, folder_of, start_or_resume, train_until_end
from ..run.tables import MIB
from . import augment, data, evaluate, networks, state
from .loop import ClassifierLoop
from .optimizers import refuse_forgetful
from .options import Options, parse
from .report import Report
from .state import ClassifierState


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 after the last step, 128 + the signal if one ended it."""
    options = parse(arguments)
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

            prepare_folder(Path(options.export))  # raises for what is missing before the training
        out = folder_of(options, world)
        run = start_or_resume(
            out, lambda is_new: state.start(options, world, config, found, is_new)
        )
        report = Report(run, out)
        return train_until_end(report, lambda *control: _train(run, found, side, report, *control))


def prepare(options: Options) -> tuple[data.Data, Config, int]:
    """The data, the model's configuration and the side of images, which depend on each other."""
    config = networks.config(options, 1)
    side = options.image_size or config.resolution
    if options.data is None:
        found = data.digits(config.in_chans, side, options.split_seed)
    else:
        found = data.folder(options.data, config.in_chans, side, options.split_seed)
    return found, networks.config(options, len(found.classes)), side


def _train(run: ClassifierState, found: data.Data, side: int, report: Report, keeper, signals):
    """Trains and tests; returns False if a signal ended it."""
    options, mode = run.options, data.MODES[run.config.in_chans]
    transform = augment.for_evaluation(options, mode, side)
    blank = torch.zeros(run.config.in_chans, side, side)
    val, test = (data.Evaluation(part, transform, blank) for part in (found.val, found.test))
    report.say(
        f"{len(found.train)} images to train on, {len(val)} to validate, {len(test)} to "
        f"test{' (the same)' if found.test is found.val else ''}, {len(found.classes)} classes; "
        f"{parameter_count(run.model):,} parameters; from step {run.step} of {run.steps}"
    )
    report.skip(found.skipped)
    if run.world.device.type == "cuda" and options.compile is None:
        if run.world.is_first_of_machine:  # the kernels' cache is on its disk
            images = options.batch_size // options.accumulate // run.world.size
            report.say(networks.compile_kernels(options, run.world, run.config, images, side))
        run.world.any(False)  # the others wait
    views = data.Training(found.train, augment.for_training(options, mode, side), options.seed)
    collate = augment.Collate(len(found.classes), options.mixup, options.cutmix)
    batches = iter(training_loader(run, views, collate, options.accumulate))
    loop = ClassifierLoop(
        batches, report, keeper, signals, validate=lambda: evaluate.evaluate(run, val, signals)
    )
    score = loop.train() and evaluate.evaluate(run, test, signals)
    if score:
        report.skip(score.skipped)
        try:
            write_result(run, found.classes, test, report)
        finally:
            report.finish(score)  # also if the disk is full or the export failed
    return bool(score)


def write_result(
    run: ClassifierState, classes: list[str], test: data.Evaluation, report: Report
) -> None:
    """Writes the weights that were tested, and exports them if asked."""
    weights = get_model_state_dict(run.result, options=checkpoint.WHOLE)
    if not run.world.is_first:
        return
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    path = report.out / WEIGHTS
    try:
        about = {MODEL_OPTIONS: networks.model_options(run.options)}
        checkpoint.write_atomically(path, safetensors.torch.save(tensors, about))
    except OSError as error:
        raise RunError(
            f"{path} not written: {error}; the run is kept in {report.out}: make room and run "
            "again with --resume auto"
        ) from error
    if run.options.export is not None:
        from .export import export

        network = RevBiFPN(run.config)
        network.load_state_dict(weights)
        report.say(export(network, Path(run.options.export), test, classes))


def print_memory(options: Options, config: Config, side: int) -> None:
    """What a step takes on top of weights, gradients and optimizer, counted on fake tensors."""
    print(f"{'images':>6}{'mode':>14}{'held MiB':>12}{'peak MiB':>12}")
    for images in (2, 16):
        for reversible in (True, False):
            model = RevBiFPN(config, reversible=reversible)
            shape = (images, config.in_chans, side, side)
            memory = training_memory(model, shape, autocast=dtype_of(options))
            held, peak = (count / MIB for count in memory)
            name = "reversible" if reversible else "stored"
            print(f"{images:6}{name:>14}{held:12.1f}{peak:12.1f}", flush=True)
