"""Loss and accuracy on images that are not trained on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ..run.processes import World
from ..run.signals import Signals, ignore_signals
from .augment import Collate
from .data import IGNORED, Evaluation
from .options import Options


class Score(NamedTuple):
    loss: float
    accuracy: float  # share of the images that could be read
    count: int
    skipped: tuple


def shares(count: int, batch: int, world: World) -> Iterator[list[int]]:
    """This rank's images in batches, as many on every rank: sharded networks run in step."""
    per_rank = -(-count // world.size)
    numbers = [k if k < count else IGNORED for k in range(per_rank * world.size)]
    own = numbers[world.rank :: world.size]
    for start in range(0, per_rank, batch):
        yield own[start : start + batch]


@torch.no_grad()
def evaluate(
    network: nn.Module, views: Evaluation, options: Options, world: World, signals: Signals
) -> Score | None:
    """Every image once, spread over the processes; None if a signal to any of them ended it."""
    was_training = [module for module in network.modules() if module.training]
    network.eval()
    batch = max(1, options.batch_size // (options.accumulate * world.size))
    loader = DataLoader(
        views,
        batch_sampler=list(shares(len(views), batch, world)),
        collate_fn=Collate(),
        num_workers=options.workers if options.dataset == "folder" else 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # not the global one, which training goes on with
    )
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    skipped = []
    for images, labels, unread in loader:
        if world.any(signals.received is not None)[0]:
            return None
        images, labels = images.to(world.device), labels.to(world.device)
        with autocast(options, world):
            logits = network(images).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        is_counted = labels != IGNORED
        right = (logits.argmax(1) == labels) & is_counted
        sums += torch.stack([loss.double(), right.sum().double(), is_counted.sum().double()])
        skipped += unread
    for module in was_training:
        module.training = True
    loss, right, count = world.total(sums).tolist()
    nan = float("nan")
    return Score(
        loss / count if count else nan, right / count if count else nan, int(count), tuple(skipped)
    )


def autocast(options: Options, world: World):
    is_on = options.amp != "none"
    dtype = getattr(torch, options.amp) if is_on else torch.bfloat16
    return torch.autocast(world.device.type, dtype, enabled=is_on)
