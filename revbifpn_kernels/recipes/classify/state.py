"""All that a run is between two steps: made from options, captured, restored."""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from ..run import checkpoint, processes
from ..run.checkpoint import WHOLE
from ..run.order import Order, seed_of
from ..run.processes import World
from . import networks
from .data import Data
from .optimizers import optimizer_of, schedule_of
from .options import Options, TrainError, refuse_changes, saved

VERSION = 2


@dataclass
class Run:
    """A training run after `step` steps."""

    options: Options
    config: Config
    world: World
    order: Order
    model: RevBiFPN  # the bare network; sharded under FSDP
    net: nn.Module  # what a step calls
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    scaler: torch.amp.GradScaler
    digest: str  # of the training images
    losses: list[float] = field(default_factory=list)  # of the steps since the last validation
    step: int = 0
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.options.epochs * self.order.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.order.steps_per_epoch

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated: averaged weights, if there are any."""
        return self.model if self.ema is None else self.ema.module


def start(options: Options, world: World, config: Config, data: Data, is_new: bool = True) -> Run:
    """A run before its first step; one that is to be restored does without `--checkpoint`."""
    order = Order(len(data.train.labels), options.batch_size, options.seed)
    model = networks.build(options, config, is_new)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = processes.synchronised(model.to(world.device), world)
    # Copied before it is sharded or compiled: neither can be copied afterwards.
    ema = None
    if options.ema_decay:
        # Not by lists of tensors under FSDP: parameters are sharded there, statistics are not.
        ema = ModelEmaV3(model, options.ema_decay, use_warmup=True, foreach=not options.fsdp)
    if options.fsdp and ema is not None:
        processes.shard(ema.module, world)
    net = processes.distributed(model, world, options.fsdp)
    if options.compile is not None:
        networks.compile_parts(model, options.compile)
    optimizer = optimizer_of(options, model)
    torch.manual_seed(seed_of(options.seed, world.rank))  # dropout: other samples, other numbers
    return Run(
        options=options,
        config=config,
        world=world,
        order=order,
        model=model,
        net=net,
        ema=ema,
        optimizer=optimizer,
        schedule=schedule_of(options, optimizer, order.steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.amp == "float16"),
        digest=_digest(data),
    )


def _digest(data: Data) -> str:
    """Changes with the training images' names and labels, their order and the classes."""
    names = [data.train.name(k) for k in range(len(data.train.labels))]
    content = repr((data.classes, names, list(data.train.labels))).encode()
    return f"{len(names)} images, {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def capture(run: Run) -> dict[str, Any]:
    """A checkpoint's content, on the first rank; every rank must call it."""
    return {
        "version": VERSION,
        "options": saved(run.options),
        "data": run.digest,
        "step": run.step,
        "losses": run.losses,
        "seconds": run.seconds,
        "model": get_model_state_dict(run.model, options=WHOLE),
        "ema": None if run.ema is None else get_model_state_dict(run.ema.module, options=WHOLE),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=WHOLE),
        "scaler": run.scaler.state_dict(),
        "generators": run.world.gathered(checkpoint.generators()),
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Raises:
        TrainError: It is of a run with other options or data; the differences are listed.
    """
    if state.get("version") != VERSION:
        raise TrainError(
            f"train: --resume: expected a checkpoint of version {VERSION}, got "
            f"{state.get('version')}"
        )
    refuse_changes(
        state["options"] | {"training images": state["data"]},
        saved(run.options) | {"training images": run.digest},
    )
    set_model_state_dict(run.model, state["model"], options=WHOLE)
    if run.ema is not None:
        set_model_state_dict(run.ema.module, state["ema"], options=WHOLE)
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=WHOLE)
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.losses, run.seconds = state["step"], state["losses"], state["seconds"]
    ranks = len(state["generators"])
    if ranks != run.world.size:
        warnings.warn(
            f"train: the checkpoint is of {ranks} processes, continuing on {run.world.size}: the "
            "same images in each step, other rounding, dropout and mixtures",
            stacklevel=2,
        )
    if run.world.rank < ranks:
        checkpoint.set_generators(state["generators"][run.world.rank])
