"""A detector's state between two steps: created, captured, restored."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from ..run import checkpoint
from ..run.errors import RunError
from ..run.order import Order, seed_of
from ..run.processes import World, device_of
from ..run.state import RunState
from . import networks
from .coco import because
from .data import Data
from .options import Options
from .scenes import Scenes

BETAS = (0.9, 0.99)  # AdamW's; 0.99, because short trainings have few steps for second moments


@dataclass(kw_only=True)
class DetectorState(RunState):
    """A detector after `step` steps."""

    COUNTERS: ClassVar = ("step", "seconds", "cpu_seconds", "trained_seconds")

    model: FasterRCNN

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by --minutes, whichever is further."""
        limit = 60 * self.options.minutes
        return min(1.0, max(super().progress, self.trained_seconds / limit if limit else 0.0))

    @property
    def lr(self) -> float:
        """Linear warm-up, and a cosine to 0."""
        warmup = min(1.0, (self.step + 1) / max(1, self.options.warmup_steps))
        return self.options.lr * warmup * (1 + math.cos(math.pi * self.progress)) / 2

    def captured_tensors(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": checkpoint.generators(),
        }

    def restore_tensors(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        checkpoint.set_generators(content["generators"])


def start(options: Options, data: Data) -> DetectorState:
    """A run before its first step."""
    world = World(0, 1, device_of(options.device))
    if len(data.train) < options.batch_size:
        raise RunError(
            f"--batch-size must be at most the {len(data.train)} training images, got "
            f"{options.batch_size}{because(data.skipped)}"
        )
    model = networks.build(options, len(data.classes)).to(world.device)
    torch.manual_seed(seed_of(options.seed))  # of the proposals that the losses see
    return DetectorState(
        options=options,
        world=world,
        order=Order(len(data.train), options.batch_size, options.seed),
        model=model,
        optimizer=_optimizer(options, model),
        digest=_digest(data),
    )


def _optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; vectors, which are biases and norms, do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, options.lr, BETAS, weight_decay=options.weight_decay, fused=True
    )


def _digest(data: Data) -> str:
    """A hash of the training images' names, sizes and annotations, and of the classes."""
    if isinstance(data.train, Scenes):
        return "digits"  # a function of the options
    digest = hashlib.blake2b(repr(data.classes).encode(), digest_size=8)
    for image in data.train.images:
        digest.update(repr(image).encode())
    return digest.hexdigest()
