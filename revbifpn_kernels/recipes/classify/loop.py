"""Steps, evaluations between them, checkpoints, and losses that are not finite."""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..run.checkpoint import Keeper
from ..run.processes import reducing, share_statistics
from ..run.signals import Signals
from .augment import Batch
from .evaluate import Score, autocast
from .networks import to_training
from .options import TrainError
from .report import Report
from .state import Run

LEAST_SCALE = 2.0**-14  # of float16's losses: halved at each overflow from 2^16 on


class Done(NamedTuple):
    """A step that has been made and not yet looked at."""

    step: int
    lr: float
    loss: Tensor
    gradient: Tensor
    seconds: float
    waited: float


def train(
    run: Run,
    batches: Iterator[Batch],
    validate: Callable[[], Score | None],
    report: Report,
    keeper: Keeper,
    signals: Signals,
) -> bool:
    """Go on until the last step; whether that was reached, and no signal came before."""
    recent: list[Done] = []
    began = time.monotonic() - run.seconds
    while True:
        if run.losses and run.step % run.order.steps_per_epoch == 0:
            score = validate()
            if score is None:
                return False
            report.skip(score.skipped)
            report.epoch(math.fsum(run.losses) / len(run.losses), score)
            run.losses = []
            run.seconds = time.monotonic() - began
        if run.step == run.steps:
            return True
        recent.append(advance(run, batches, report))
        run.seconds = time.monotonic() - began
        is_epoch = run.step % run.order.steps_per_epoch == 0
        # The clock of the first rank counts: a checkpoint is written by all together.
        is_due, is_stopped = run.world.any(
            run.world.is_first and keeper.is_due, signals.received is not None
        )
        is_kept = is_epoch or is_due or is_stopped  # an evaluation may take long
        if is_kept or len(recent) >= run.options.log_every:
            run.losses += settle(run, recent, report, keeper)
            recent.clear()
        if is_kept:
            keeper.save(run.step)
        if is_stopped:
            return False


def advance(run: Run, batches: Iterator[Batch], report: Report) -> Done:
    """One step of the optimizer, on all parts of its batch."""
    options, device = run.options, run.world.device
    start, waited = time.monotonic(), 0.0
    to_training(run.model, options.freeze)
    run.schedule.step_update(run.step)
    total = torch.zeros((), device=device)
    for part in range(options.accumulate):
        before = time.monotonic()
        images, labels, skipped = next(batches)
        waited += time.monotonic() - before
        report.skip(skipped)
        images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with reducing(run.net, is_last=part == options.accumulate - 1):
            with autocast(options, run.world):
                logits = run.net(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.label_smoothing)
            run.scaler.scale(loss / options.accumulate).backward()
        total += loss.detach() / options.accumulate
    gradient = _update(run)
    lr = run.optimizer.param_groups[0]["lr"]
    run.step += 1
    return Done(run.step, lr, total, gradient, time.monotonic() - start, waited)


def _update(run: Run) -> Tensor:
    """Move weights, their average and statistics; the gradient's length before it was clipped."""
    trained = [p for p in run.model.parameters() if p.grad is not None]
    run.scaler.unscale_(run.optimizer)
    gradient = torch.nn.utils.clip_grad_norm_(trained, run.options.clip_grad or math.inf)
    if isinstance(gradient, torch.distributed.tensor.DTensor):
        gradient = gradient.full_tensor()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    share_statistics(run.model, run.world)
    if run.ema is not None:
        run.ema.update(run.model, step=run.step)
    return gradient


def settle(run: Run, recent: list[Done], report: Report, keeper: Keeper) -> list[float]:
    """Look at steps: one that is not finite ends the run before anything of it is kept."""
    sums = torch.stack([torch.stack([done.loss, done.gradient]) for done in recent]).double()
    sums[:, 0] = run.world.total(sums[:, 0].contiguous()) / run.world.size
    values = sums.tolist()
    for done, (loss, gradient) in zip(recent, values, strict=True):
        # A GradScaler looks for gradients that overflow, and skips them.
        kinds = {"loss": loss} | ({} if run.scaler.is_enabled() else {"gradient": gradient})
        for kind, value in kinds.items():
            if not math.isfinite(value):
                raise TrainError(
                    f"train: expected a finite {kind}, got {value} in step {done.step} (epoch "
                    f"{(done.step - 1) // run.order.steps_per_epoch + 1}), learning rate "
                    f"{done.lr:.3g}; last good checkpoint: {keeper.described()}"
                )
    if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:
        raise TrainError(
            f"train: expected gradients that float16 holds, got an overflow in each of the steps "
            f"before step {run.step}; last good checkpoint: {keeper.described()}"
        )
    losses, gradients = zip(*values, strict=True)
    report.log(
        len(recent),
        math.fsum(losses) / len(losses),
        math.fsum(gradients) / len(gradients),
        sum(done.seconds for done in recent),
        sum(done.waited for done in recent),
    )
    return list(losses)
