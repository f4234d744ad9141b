"""Loss and accuracy on images that are not trained on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..run.networks import dtype_of
from ..run.processes import World
from ..run.samples import loader
from ..run.signals import Signals
from .augment import Collate
from .data import IGNORED, Evaluation
from .options import Options
from .state import ClassifierState


class Score(NamedTuple):
    loss: float
    accuracy: float  # share of the images that could be read
    count: int
    skipped: tuple


def shares(count: int, batch: int, world: World) -> Iterator[list[int]]:
    """This process' batches of indices, as many as every process has: FSDP needs equal numbers."""
    per_rank = -(-count // world.size)
    numbers = [k if k < count else IGNORED for k in range(per_rank * world.size)]
    own = numbers[world.rank :: world.size]
    for start in range(0, per_rank, batch):
        yield own[start : start + batch]


@torch.no_grad()
def evaluate(run: ClassifierState, views: Evaluation, signals: Signals) -> Score | None:
    """Scores each image once, over all processes, in eval mode; None if a signal to any came."""
    network, options, world = run.result, run.options, run.world
    network.eval()
    batch = max(1, options.batch_size // (options.accumulate * world.size))
    batches = loader(
        views,
        options.workers if options.dataset == "folder" else 0,
        batch_sampler=list(shares(len(views), batch, world)),
        collate_fn=Collate(),
    )
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    skipped = []
    for images, labels, unread in batches:
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
    *totals, count = world.total(sums)
    loss, accuracy = ((total / count).item() for total in totals)  # NaN of no image
    return Score(loss, accuracy, int(count), tuple(skipped))


def autocast(options: Options, world: World):
    dtype = dtype_of(options)
    return torch.autocast(world.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
