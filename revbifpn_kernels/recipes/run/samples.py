"""Samples of both applications: splits, replacements for unreadable files, loaders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import RunError
from .images import BadImage
from .order import MicroBatches
from .signals import ignore_signals

PATIENCE = 100  # bad files in a row, after which the disk is to blame

Skipped = tuple[str, str]  # the name of a file, and why


@dataclass
class Views(Dataset):
    """The samples of a source of images: by `Key` in training, by index in evaluation."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)


def split(labels: Sequence[int], seed: int, shares: Sequence[float]) -> list[list[int]]:
    """Returns the indices of each part, stratified: each part gets at least one image of each class
    that has enough.
    """
    parts: list[list[int]] = [[] for _ in shares]
    generator = torch.Generator().manual_seed(seed)
    members: dict[int, list[int]] = {}
    for k, label in enumerate(labels):
        members.setdefault(label, []).append(k)
    for _, of_class in sorted(members.items()):
        shuffled = [of_class[k] for k in torch.randperm(len(of_class), generator=generator)]
        start, least = 0, int(len(of_class) >= len(shares))
        for part, share in zip(parts[1:], shares[1:], strict=True):
            count = max(least, round(share * len(of_class)))
            part += shuffled[start : start + count]
            start += count
        parts[0] += shuffled[start:]
    return [sorted(part) for part in parts]


def first_readable(
    count: int, index: int, load: Callable[[int], Any], name: Callable[[int], str]
) -> tuple[int, Any, list[Skipped]]:
    """Returns the first readable image from `index` on: its index, itself, what was skipped.

    Raises `RunError` if PATIENCE files in a row cannot be read, as if the disk were gone.
    """
    skipped = []
    for further in range(min(PATIENCE, count)):
        chosen = (index + further) % count
        try:
            return chosen, load(chosen), skipped
        except BadImage as error:
            skipped.append((name(chosen), str(error)))
    raise RunError(
        f"--data must be readable, got {len(skipped)} bad files in a row, the last: "
        f"{': '.join(skipped[-1])}"
    )


def loader(samples: Dataset, workers: int, **arguments) -> DataLoader:
    """A DataLoader that leaves the global generator alone: its state is part of the run."""
    return DataLoader(
        samples,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
        **arguments,
    )


def training_loader(run, samples: Dataset, collate: Callable, accumulate: int = 1) -> DataLoader:
    """Loads this process' share of all remaining steps, `accumulate` micro-batches per step."""
    return loader(
        samples,
        run.options.workers,
        batch_sampler=MicroBatches(
            run.order, run.step, run.steps, accumulate, run.world.rank, run.world.size
        ),
        collate_fn=collate,
        pin_memory=run.world.device.type == "cuda",
    )
