"""Steps, signals, losses that are not finite, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..classify.networks import to_training
from ..run.checkpoint import Keeper
from ..run.signals import Signals
from .data import Batch
from .networks import frozen
from .options import DetectError
from .report import Report
from .run import Run


class Clock:
    """Adds the time that passes to a run's."""

    def __init__(self, run: Run) -> None:
        self.run, self.last = run, self._now()

    def tick(self, is_training: bool) -> None:
        """Count what has passed since the last tick."""
        now = self._now()
        wall, cpu = (after - before for after, before in zip(now, self.last, strict=True))
        self.last = now
        self.run.seconds += wall
        self.run.cpu_seconds += cpu
        if is_training:
            self.run.trained_seconds += wall

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.process_time()


class Done(NamedTuple):
    """A step that has been made and not yet looked at."""

    step: int
    lr: float
    losses: dict[str, Tensor]
    gradient: Tensor
    seconds: float
    waited: float


def train(
    run: Run,
    batches: Iterator[Batch],
    measure: Callable[[], object],
    clock: Clock,
    report: Report,
    keeper: Keeper,
    signals: Signals,
) -> bool:
    """Go on until the last step or minute; whether that was reached, and no signal came before."""
    recent: list[Done] = []
    while run.progress < 1:
        if is_to_measure(run) and not report.has_score:
            measure()
            if signals.received is not None:
                return False
        recent.append(advance(run, batches, report))
        clock.tick(is_training=True)
        is_stopped = signals.received is not None
        is_last = run.progress >= 1
        is_kept = keeper.is_due or is_stopped or is_last or is_to_measure(run)  # that takes long
        if is_kept or len(recent) >= run.options.log_every:
            settle(run, recent, report, keeper)
            recent.clear()
        if is_kept:
            keeper.save(run.step)
        if is_stopped:
            return False
    if keeper.step is None:  # not a step was to be made
        keeper.save(run.step)
    return True


def is_to_measure(run: Run) -> bool:
    """Whether an evaluation amid the training is due after this step."""
    between = run.options.eval_every * run.order.steps_per_epoch
    return run.step > 0 and between > 0 and run.step % between == 0


def advance(run: Run, batches: Iterator[Batch], report: Report) -> Done:
    """One step of the optimizer."""
    start, lr = time.monotonic(), run.lr
    images, targets, skipped = next(batches)
    waited = time.monotonic() - start
    report.skip(skipped)
    images = [image.to(run.device) for image in images]
    targets = [{key: t.to(run.device) for key, t in target.items()} for target in targets]
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    to_training(run.model, frozen(run.options))
    losses = run.model(images, targets)
    sum(losses.values()).backward()
    trained = [p for p in run.model.parameters() if p.grad is not None]
    gradient = torch.nn.utils.clip_grad_norm_(trained, run.options.clip_grad or math.inf)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    losses = {name: loss.detach() for name, loss in losses.items()}
    return Done(run.step, lr, losses, gradient, time.monotonic() - start, waited)


def settle(run: Run, recent: list[Done], report: Report, keeper: Keeper) -> None:
    """Look at steps: one that is not finite ends the run before anything of it is kept."""
    for done in recent:
        for name, value in [*done.losses.items(), ("gradient", done.gradient)]:
            if not math.isfinite(value):
                raise DetectError(
                    f"detect: expected a finite {name}, got {float(value)} in step {done.step}, "
                    f"learning rate {done.lr:.3g}; last good checkpoint: {keeper.described()}"
                )
    losses = {
        name: math.fsum(float(done.losses[name]) for done in recent) / len(recent)
        for name in recent[0].losses
    }
    seconds, waited = sum(done.seconds for done in recent), sum(done.waited for done in recent)
    report.log(len(recent), losses, recent[-1].lr, seconds, waited)
