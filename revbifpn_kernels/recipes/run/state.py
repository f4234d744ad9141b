"""A run between two steps: what all applications capture in a checkpoint and restore from it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .errors import RunError
from .options import RunOptions, fields_of, refuse_changes
from .order import Order
from .processes import World

VERSION = 2


@dataclass(kw_only=True)
class RunState:
    """A training run after `step` steps."""

    COUNTERS: ClassVar[tuple[str, ...]] = ("step", "seconds")  # attributes that a checkpoint has

    options: RunOptions
    world: World
    order: Order
    optimizer: torch.optim.Optimizer
    digest: str  # of the training images
    step: int = 0
    seconds: float = 0.0  # of training and the evaluations during it
    cpu_seconds: float = 0.0  # the same, CPU time of all threads
    trained_seconds: float = 0.0  # of training alone

    @property
    def steps(self) -> int:
        return self.options.epochs * self.order.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction within an epoch."""
        return self.step / self.order.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return self.step / self.steps if self.steps else 1.0

    def captured_tensors(self) -> dict[str, Any]:
        """Weights, the optimizer's state, generators; each process must call it."""
        raise NotImplementedError

    def restore_tensors(self, content: dict[str, Any]) -> None:
        raise NotImplementedError

    def capture(self) -> dict[str, Any]:
        """Returns a checkpoint's content, on the first process; each process must call it."""
        about = {"version": VERSION, "options": self.options.fixed_on_resume(), "data": self.digest}
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return about | counters | self.captured_tensors()

    def restore(self, content: dict[str, Any]) -> None:
        """Continues from a checkpoint; raises `RunError` if its options or data differ."""
        if content.get("version") != VERSION or "optimizer" not in content:
            raise RunError(
                f"--resume: expected a checkpoint of version {VERSION} of this command, got "
                f"{content.get('version')} with {', '.join(map(str, content))}"
            )
        refuse_changes(
            content["options"] | {"training images": content["data"]},
            self.options.fixed_on_resume() | {"training images": self.digest},
            list(fields_of(type(self.options))),
        )
        for name in self.COUNTERS:
            setattr(self, name, content[name])
        self.restore_tensors(content)
