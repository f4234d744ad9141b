"""A classifier's steps, and the validation after each epoch."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..run.errors import RunError
from ..run.loop import Loop, Step
from ..run.networks import to_training
from ..run.processes import reducing, share_statistics
from .evaluate import Score, autocast

LEAST_SCALE = 2.0**-14  # of float16 losses; the scaler starts at 2^16, halves at overflows


class ClassifierLoop(Loop):
    """Trains a classifier; `validate` returns None if a signal ended it."""

    def __init__(self, *arguments, validate: Callable[[], Score | None]) -> None:
        super().__init__(*arguments)
        self.validate = validate
        # A GradScaler looks for gradients that overflow, and skips them.
        self.checks_gradient = not self.run.scaler.is_enabled()

    def is_evaluation_due(self) -> bool:
        return self.run.step % self.run.order.steps_per_epoch == 0

    def evaluate_if_due(self) -> bool:
        run = self.run
        if not run.losses or not self.is_evaluation_due():
            return True
        score = self.validate()
        if score is None:
            return False
        self.report.skip(score.skipped)
        self.report.epoch(math.fsum(run.losses) / len(run.losses), score)
        run.losses = []
        self.clock.tick(is_training=False)
        return True

    def advance(self) -> Step:
        """One step of the optimizer, on all micro-batches of its batch."""
        run, options, device = self.run, self.run.options, self.run.world.device
        waited = 0.0
        to_training(run.model, options.freeze)
        run.schedule.step_update(run.step)
        total = torch.zeros((), device=device)
        for part in range(options.accumulate):
            batch, seconds = self.next_batch()
            waited += seconds
            images, labels = (t.to(device, non_blocking=True) for t in batch)
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with reducing(run.net, is_last=part == options.accumulate - 1):
                with autocast(options, run.world):
                    logits = run.net(images).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
                run.scaler.scale(loss / options.accumulate).backward()
            total += loss.detach() / options.accumulate
        return Step({"loss": total}, self._update(), run.optimizer.param_groups[0]["lr"], waited)

    def _update(self) -> Tensor:
        """Updates weights, their average and statistics; returns the unclipped gradient norm."""
        run = self.run
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

    def check_scale(self) -> None:
        run = self.run
        if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:
            raise RunError(
                "expected gradients that float16 holds, got an overflow in each of the steps "
                f"before step {run.step}; last good checkpoint: {self.keeper.described()}"
            )

    def check_and_log(self, recent: list[Step]) -> list[list[float]]:
        rows = super().check_and_log(recent)
        self.run.losses += [loss for loss, _ in rows]
        return rows
