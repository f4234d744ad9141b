"""A classifier's state between two steps: created, captured, restored."""

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint import state_dict as states

from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from ..run import checkpoint, processes
from ..run.checkpoint import WHOLE
from ..run.order import Order, seed_of
from ..run.processes import World
from ..run.state import RunState
from . import networks
from .data import Data
from .optimizers import optimizer_of, schedule_of
from .options import Options


@dataclass(kw_only=True)
class ClassifierState(RunState):
    """A classifier after `step` steps."""

    COUNTERS: ClassVar = ("step", "losses", "seconds")

    config: Config
    model: RevBiFPN  # the bare network; sharded under FSDP
    net: nn.Module  # what a step calls
    ema: ModelEmaV3 | None
    schedule: CosineLRScheduler
    scaler: torch.amp.GradScaler
    losses: list[float] = field(default_factory=list)  # of the steps since the last validation

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated: averaged weights, if there are any."""
        return self.model if self.ema is None else self.ema.module

    def captured_tensors(self) -> dict[str, Any]:
        model, optimizer = states.get_state_dict(self.model, self.optimizer, options=WHOLE)
        ema = None
        if self.ema is not None:
            ema = states.get_model_state_dict(self.ema.module, options=WHOLE)
        return {
            "model": model,
            "ema": ema,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "generators": self.world.gathered(checkpoint.generators()),
        }

    def restore_tensors(self, content: dict[str, Any]) -> None:
        states.set_model_state_dict(self.model, content["model"], options=WHOLE)
        if self.ema is not None:
            states.set_model_state_dict(self.ema.module, content["ema"], options=WHOLE)
        optimizer = content["optimizer"]
        states.set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=WHOLE)
        self.scaler.load_state_dict(content["scaler"])
        ranks = len(content["generators"])
        if ranks != self.world.size:
            warnings.warn(
                f"train: the checkpoint is of {ranks} processes, continuing on {self.world.size}: "
                "the same images in each step, other rounding, dropout and mixtures",
                stacklevel=2,
            )
        if self.world.rank < ranks:
            checkpoint.set_generators(content["generators"][self.world.rank])


def start(
    options: Options, world: World, config: Config, data: Data, is_new: bool = True
) -> ClassifierState:
    """A run before its first step; unless `is_new`, it does not load `--checkpoint`."""
    order = Order(len(data.train), options.batch_size, options.seed)
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
    torch.manual_seed(seed_of(options.seed, world.rank))  # other dropout for each process' images
    return ClassifierState(
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
    """A hash of the training images' names and labels, in order, and of the classes."""
    content = repr((data.classes, data.train.names, list(data.train.labels))).encode()
    return f"{len(data.train)} images, {hashlib.blake2b(content, digest_size=8).hexdigest()}"
