"""Steps, evaluations between them, checkpoints, signals, and losses that are not finite."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import clock
from .checkpoint import Keeper
from .console import Console
from .errors import RunError
from .signals import Signals


class Step(NamedTuple):
    """A step that has been made; its numbers have not been read from the device yet."""

    losses: dict[str, Tensor]
    grad_norm: Tensor  # before clipping
    lr: float
    waited: float  # seconds for images
    number: int = 0
    seconds: float = 0.0


class Loop:
    """The training loop; subclasses define `advance` and the evaluation.

    `batches` iterates over this process' micro-batches of all remaining steps.
    """

    checks_gradient = True  # whether a gradient that is not finite ends the run

    def __init__(
        self, batches: Iterator, report: Console, keeper: Keeper, signals: Signals
    ) -> None:
        self.run, self.batches, self.report = report.run, batches, report
        self.keeper, self.signals = keeper, signals
        self.clock = clock.Clock(self.run)

    def advance(self) -> Step:
        """Makes one step of the optimizer."""
        raise NotImplementedError

    def is_evaluation_due(self) -> bool:
        """Whether an evaluation during the training is due after the step just made."""
        raise NotImplementedError

    def evaluate_if_due(self) -> bool:
        """Evaluates if that is due and not done yet; returns False if a signal ended it."""
        raise NotImplementedError

    def next_batch(self) -> tuple[tuple, float]:
        """The next micro-batch, without its skipped files, and the seconds waited for it."""
        start = clock.now()
        *batch, skipped = next(self.batches)
        waited = clock.now() - start
        self.report.skip(skipped)
        return tuple(batch), waited

    def train(self) -> bool:
        """Trains; returns whether it reached the last step before a signal came."""
        run, recent = self.run, []
        while True:
            if not self.evaluate_if_due():
                return False
            if run.progress >= 1:
                return True
            start = clock.now()
            step = self.advance()
            run.step += 1
            recent.append(step._replace(number=run.step, seconds=clock.now() - start))
            self.clock.tick(is_training=True)
            # The first process' clock decides: a checkpoint is written by all together.
            is_due, is_stopped = run.world.any(
                run.world.is_first and self.keeper.is_due, self.signals.received is not None
            )
            # Also before an evaluation, which may take long.
            save_now = is_due or is_stopped or run.progress >= 1 or self.is_evaluation_due()
            if save_now or len(recent) >= run.options.log_every:
                self.check_and_log(recent)
                recent.clear()
            if save_now:
                self.keeper.save()
            if is_stopped:
                return False

    def check_scale(self) -> None:
        """Raises if steps cannot go on although their losses are finite."""

    def check_and_log(self, recent: list[Step]) -> list[list[float]]:
        """Logs the means of steps; raises if a loss is not finite, before a checkpoint is written.

        Returns losses and gradient norm of each step.
        """
        world, names = self.run.world, [*recent[0].losses, "gradient"]
        tensors = [torch.stack([*step.losses.values(), step.grad_norm]) for step in recent]
        values = torch.stack(tensors).double()
        values[:, :-1] = world.total(values[:, :-1].contiguous()) / world.size
        rows = values.tolist()
        for step, row in zip(recent, rows, strict=True):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value) and (self.checks_gradient or name != "gradient"):
                    epoch = (step.number - 1) // self.run.order.steps_per_epoch + 1
                    raise RunError(
                        f"expected a finite {name}, got {value} in step {step.number} (epoch "
                        f"{epoch}), learning rate {step.lr:.3g}; last good checkpoint: "
                        f"{self.keeper.described()}"
                    )
        self.check_scale()
        means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        seconds, waited = (sum(s.seconds for s in recent), sum(s.waited for s in recent))
        means = dict(zip(names, means, strict=True))
        self.report.log(len(recent), means, recent[-1].lr, seconds, waited)
        return rows
