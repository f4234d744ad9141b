"""All that a run is between two steps: made from options, captured, restored."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from ..classify.options import refuse_changes
from ..run import checkpoint
from ..run.order import Order, seed_of
from . import networks
from .coco import because
from .data import Data, Digits
from .options import DetectError, Options, saved

VERSION = 2
BETAS = (0.9, 0.99)  # AdamW's; a short training's second moments are of few steps


@dataclass
class Run:
    """A training run after `step` steps."""

    options: Options
    device: torch.device
    order: Order
    model: FasterRCNN
    optimizer: torch.optim.Optimizer
    digest: str  # of the training images
    step: int = 0
    seconds: float = 0.0  # measuring included
    cpu_seconds: float = 0.0  # of all threads
    trained_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.options.epochs * self.order.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that is done, by steps or by the clock if that is to end it."""
        steps = self.step / self.steps if self.steps else 1.0
        limit = 60 * self.options.minutes
        return min(1.0, max(steps, self.trained_seconds / limit if limit else 0.0))

    @property
    def lr(self) -> float:
        """Linear warm-up, and a cosine to 0."""
        warmup = min(1.0, (self.step + 1) / max(1, self.options.warmup_steps))
        return self.options.lr * warmup * (1 + math.cos(math.pi * self.progress)) / 2


def start(options: Options, data: Data) -> Run:
    """A run before its first step."""
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise DetectError("detect: --device must be there, got cuda without a GPU")
    if len(data.train) < options.batch_size:
        raise DetectError(
            f"detect: --batch-size must be at most the {len(data.train)} training images, got "
            f"{options.batch_size}{because(data.skipped)}"
        )
    device = torch.device(kind)
    order = Order(len(data.train), options.batch_size, options.seed)
    model = networks.build(options, len(data.classes)).to(device)
    torch.manual_seed(seed_of(options.seed))  # of the proposals that the losses see
    return Run(options, device, order, model, _optimizer(options, model), _digest(data))


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
    """Changes with the training images' names, sizes and annotations, and with the classes."""
    if isinstance(data.train, Digits):
        return "digits"  # a function of the options
    digest = hashlib.blake2b(repr(data.classes).encode(), digest_size=8)
    for image in data.train.images:
        digest.update(repr(image).encode())
    return digest.hexdigest()


def capture(run: Run) -> dict[str, Any]:
    """A checkpoint's content."""
    return {
        "version": VERSION,
        "options": saved(run.options),
        "data": run.digest,
        "step": run.step,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "trained_seconds": run.trained_seconds,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generators": checkpoint.generators(),
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Raises:
        DetectError: It is of a run with other options or data; the differences are listed.
    """
    if state.get("version") != VERSION or "optimizer" not in state:
        raise DetectError(
            f"detect: --resume: expected a checkpoint of version {VERSION} of this command, got "
            f"{state.get('version')} with {', '.join(map(str, state))}"
        )
    refuse_changes(
        state["options"] | {"training images": state["data"]},
        saved(run.options) | {"training images": run.digest},
        DetectError,
    )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    for name in ("step", "seconds", "cpu_seconds", "trained_seconds"):
        setattr(run, name, state[name])
    checkpoint.set_generators(state["generators"])
