"""Labelled images: where they come from, how they are split, and samples by key."""

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from ..run.errors import RunError
from ..run.images import BadImage, open_image
from ..run.order import Key, drawing_from, seed_of
from ..run.samples import Skipped, Views, first_readable, split

MODES = {1: "L", 3: "RGB"}  # of images, by channels
IGNORED = -1  # label of padding and of unreadable files
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
DIGITS_SHARES = (0.7, 0.1, 0.2)
FOLDER_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Source:
    """Labelled images by index. `load` returns what transforms take, or raises `BadImage`."""

    labels: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]


class Data(NamedTuple):
    """Three disjoint parts; without a test folder, `test` is `val`."""

    classes: list[str]
    train: Source
    val: Source
    test: Source
    skipped: list[Skipped]  # known to be unusable without opening a file


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's 1797 handwritten digits of 8×8 pixels, enlarged."""

    images: Tensor  # (N, C, side, side), uint8

    def load(self, index: int) -> Tensor:
        return self.images[index]


@dataclass(frozen=True)
class Files(Source):
    """Images on a disk."""

    paths: list[Path]
    mode: str
    side: int

    def load(self, index: int):
        return open_image(self.paths[index], self.mode, self.side)


def digits(channels: int, side: int, split_seed: int) -> Data:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, channels, -1, -1)
    parts = []
    for numbers in split(labels.tolist(), split_seed, DIGITS_SHARES):
        chosen, named = [int(labels[k]) for k in numbers], [f"digit {k}" for k in numbers]
        parts.append(Digits(chosen, named, images[numbers].contiguous()))
    return Data([str(k) for k in range(10)], *parts, [])


def folder(root: str, channels: int, side: int, split_seed: int) -> Data:
    """A folder with train/ and val/, perhaps test/, or with a folder for each class."""
    top = Path(root)
    if not top.is_dir():
        raise RunError(f"--data must be a folder, got {root}")
    found = {
        part: next((top / name for name in names if (top / name).is_dir()), None)
        for part, names in SPLITS.items()
    }
    mode = MODES[channels]
    if found["train"] is None:
        classes = _classes(top)
        files, skipped = listed(top, top, classes, mode, side)
        parts = [_subset(files, part) for part in split(files.labels, split_seed, FOLDER_SHARES)]
    else:
        if found["val"] is None:
            raise RunError(f"--data must have val/ beside train/, got {root} without it")
        classes = _classes(found["train"])
        parts, skipped = [], []
        for part in filter(None, found.values()):
            files, unfit = listed(part, top, classes, mode, side)
            parts.append(files)
            skipped += unfit
        parts += parts[1:] if found["test"] is None else []
    for part, files in zip(SPLITS, parts, strict=True):
        if not files.paths:
            raise RunError(
                f"--data must have images to {part} on, got none in {root}; a folder that "
                "is to be split needs three of some class"
            )
    return Data(classes, *parts, skipped)


def listed(
    folder: Path, top: Path, classes: list[str], mode: str, side: int
) -> tuple[Files, list[Skipped]]:
    """The images in a folder, sorted by name, and what is left out; names are relative to `top`."""
    paths, labels, skipped = [], [], []

    def skip(path: str | Path, reason: str, end: str = "") -> None:
        skipped.append((f"{Path(path).relative_to(top)}{end}", reason))

    for label, name in enumerate(classes):
        before = len(paths)
        for where, folders, files in _walk(folder / name, lambda *what: skip(*what, "/")):
            for file in sorted([*files, *(f for f in folders if _is_image_name(f))]):
                path = Path(where, file)
                if reason := _unfit(path):
                    skip(path, reason)
                else:
                    paths.append(path)
                    labels.append(label)
        if len(paths) == before:
            skip(folder / name, "no images; the class keeps its output", "/")
    for name in _classes(folder):
        if name not in classes:
            skip(folder / name, "not a class of the training images", "/")
    return Files(labels, [str(path.relative_to(top)) for path in paths], paths, mode, side), skipped


def _walk(start: Path, skip: Callable[[str, str], None]) -> Iterator[tuple]:
    """`os.walk` through links, each folder once; skips what cannot be read."""
    seen = set()
    for where, folders, files in os.walk(
        start, onerror=lambda error: skip(error.filename, str(error.strerror)), followlinks=True
    ):
        status = os.stat(where)
        identity = status.st_dev, status.st_ino
        if identity in seen:
            skip(where, "a link to a folder that was read already")
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        yield where, folders, files


def _classes(top: Path) -> list[str]:
    with os.scandir(top) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise RunError(f"--data must have a folder for each class, got none in {top}")
    return names


def _unfit(path: Path) -> str | None:
    if not _is_image_name(path.name):
        return "not the name of an image"
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        return str(error.strerror)
    return None if is_file else "not a regular file"


def _is_image_name(name: str) -> bool:
    return has_file_allowed_extension(name, EXTENSIONS)


def _subset(files: Files, chosen: list[int]) -> Files:
    parts = {n: [getattr(files, n)[k] for k in chosen] for n in ("labels", "names", "paths")}
    return dataclasses.replace(files, **parts)


class Sample(NamedTuple):
    image: Tensor
    label: int
    seed: int
    skipped: tuple[Skipped, ...]


@dataclass
class Training(Views):
    """Samples by `Key`. A file that cannot be read is replaced by the next that can."""

    transform: Callable
    seed: int

    def __getitem__(self, key: Key) -> Sample:
        seed = seed_of(self.seed, key.epoch, key.index)
        index, loaded, skipped = first_readable(
            len(self), key.index, self.source.load, self.source.name
        )
        with drawing_from(seed):
            image = self.transform(loaded)
        return Sample(image, self.source.labels[index], seed, tuple(skipped))


@dataclass
class Evaluation(Views):
    """Samples by index. Unreadable files and index `IGNORED` give blank images, not counted."""

    transform: Callable
    blank: Tensor

    def __getitem__(self, index: int) -> Sample:
        if index == IGNORED:
            return Sample(self.blank, IGNORED, 0, ())
        try:
            image = self.transform(self.source.load(index))
        except BadImage as error:
            return Sample(self.blank, IGNORED, 0, ((self.source.name(index), str(error)),))
        return Sample(image, self.source.labels[index], 0, ())
