"""A classifier's steps, and the validation after each epoch."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...capture import TrainingStep, capture_step
from ..run.errors import RunError
from ..run.loop import Loop, Step
from ..run.networks import dtype_of, to_training
from ..run.processes import reducing
from .evaluate import Score, autocast

LEAST_SCALE = 2.0**-14  # of float16 losses; the scaler starts at 2^16, halves at overflows


class ClassifierLoop(Loop):
    """Trains a classifier; `validate` returns None if a signal ended it."""

    def __init__(self, *arguments, validate: Callable[[], Score | None]) -> None:
        super().__init__(*arguments)
        self.validate = validate
        self.captured: TrainingStep | None = None  # with --cuda-graph
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
        run = self.run
        to_training(run.model, run.options.freeze)
        run.schedule.step_update(run.step)
        lr = run.optimizer.param_groups[0]["lr"]
        make = self._replay if run.options.cuda_graph else self._accumulate
        loss, gradient, waited = make()
        if isinstance(gradient, torch.distributed.tensor.DTensor):
            gradient = gradient.full_tensor()
        if run.ema is not None:
            run.ema.update(run.model, step=run.step)
        return Step({"loss": loss}, gradient, lr, waited)

    def _accumulate(self) -> tuple[Tensor, Tensor, float]:
        """Updates the weights; returns loss, unclipped gradient norm, seconds waited for images."""
        run, options = self.run, self.run.options
        waited, total = 0.0, torch.zeros((), device=run.world.device)
        for part in range(options.accumulate):
            batch, seconds = self._next_on_device()
            waited += seconds
            with reducing(run.net, is_last=part == options.accumulate - 1):
                with autocast(options, run.world):
                    logits = run.net(batch[0])
                loss = self._loss(logits, batch[1])
                run.scaler.scale(loss / options.accumulate).backward()
            total += loss.detach() / options.accumulate
        trained = [p for p in run.model.parameters() if p.grad is not None]
        run.scaler.unscale_(run.optimizer)
        gradient = torch.nn.utils.clip_grad_norm_(trained, options.clip_grad or math.inf)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        return total, gradient, waited

    def _replay(self) -> tuple[Tensor, Tensor, float]:
        """The same by a CUDA graph, captured on the first batch."""
        run, options = self.run, self.run.options
        batch, waited = self._next_on_device()
        if self.captured is None:
            self.captured = capture_step(
                run.net,
                self._loss,
                run.optimizer,
                batch,
                autocast=dtype_of(options),
                max_norm=options.clip_grad or math.inf,
                scaler=run.scaler if run.scaler.is_enabled() else None,
            )
        return self.captured(*batch), self.captured.grad_norm, waited

    def _next_on_device(self) -> tuple[tuple[Tensor, Tensor], float]:
        batch, waited = self.next_batch()
        images, labels = (t.to(self.run.world.device, non_blocking=True) for t in batch)
        if self.run.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return (images, labels), waited

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.run.options.label_smoothing
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

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
