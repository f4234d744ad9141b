"""Which sample is in which step: a function of the seed and the step alone.

So a run can be continued at any step, with any number of workers, on any number of processes.
"""

import contextlib
import functools
import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from .errors import RunError


class Key(NamedTuple):
    """(epoch, image): with the seed they determine the random numbers of its augmentation."""

    epoch: int
    index: int


def seed_of(*numbers: int) -> int:
    """Hashes numbers to a seed of 63 bits, the same on every machine."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and PyTorch's generators, and restores their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Order:
    """Which of `count` images form each batch of `batch_size`, shuffled anew in each epoch.

    Each epoch leaves out its last images, fewer than `batch_size`.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < self.batch_size:
            raise RunError(
                f"--batch-size must be at most the {self.count} training images, got "
                f"{self.batch_size}; give a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def keys(self, step: int) -> list[Key]:
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size
        order = _shuffled(self.count, seed_of(self.seed, epoch))
        return [Key(epoch, index) for index in order[first : first + self.batch_size]]


@functools.lru_cache(maxsize=2)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class MicroBatches(Sampler):
    """One process' share of each micro-batch of the steps `first` to `last`, as lists of keys."""

    order: Order
    first: int
    last: int
    accumulate: int = 1  # micro-batches per step
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.order.batch_size % (self.accumulate * self.ranks):
            raise RunError(
                f"--batch-size must be a multiple of --accumulate {self.accumulate} times "
                f"{self.ranks} processes, got {self.order.batch_size}"
            )

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.order.batch_size // (self.accumulate * self.ranks)
        for step in range(self.first, self.last):
            keys = self.order.keys(step)
            for k in range(self.accumulate):
                start = (k * self.ranks + self.rank) * share
                yield keys[start : start + share]
