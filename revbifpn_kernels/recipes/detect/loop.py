"""A detector's steps, and the evaluations during its training."""

import math

import torch

from ..run.loop import Loop, Step
from ..run.networks import to_training
from . import evaluate
from .data import Data
from .networks import frozen


class DetectorLoop(Loop):
    """Trains a detector."""

    def __init__(self, *arguments, data: Data) -> None:
        super().__init__(*arguments)
        self.data = data

    def train(self) -> bool:
        is_complete = super().train()
        if is_complete and self.keeper.step is None:  # --epochs 0: no step was made
            self.keeper.save()
        return is_complete

    def is_evaluation_due(self) -> bool:
        between = self.run.options.eval_every * self.run.order.steps_per_epoch
        return self.run.step > 0 and between > 0 and self.run.step % between == 0

    def evaluate_if_due(self) -> bool:
        # After the last step `measure` is called for the final result.
        if self.run.progress < 1 and self.is_evaluation_due() and not self.report.has_score:
            self.measure()
            return self.signals.received is None
        return True

    def measure(self) -> evaluate.Result | None:
        """Evaluates the detector and reports the scores; returns None if a signal ended it."""
        result = evaluate.evaluate(self.run, self.data, self.signals)
        self.clock.tick(is_training=False)
        if result is not None:
            self.report.score(result)
        return result

    def advance(self) -> Step:
        """One step of the optimizer."""
        run, lr = self.run, self.run.lr
        (images, targets), waited = self.next_batch()
        images = [image.to(run.world.device) for image in images]
        targets = [{key: t.to(run.world.device) for key, t in one.items()} for one in targets]
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        to_training(run.model, frozen(run.options))
        losses = run.model(images, targets)
        sum(losses.values()).backward()
        trained = [p for p in run.model.parameters() if p.grad is not None]
        gradient = torch.nn.utils.clip_grad_norm_(trained, run.options.clip_grad or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return Step({name: loss.detach() for name, loss in losses.items()}, gradient, lr, waited)
