"""Images and targets by key, from generated scenes or from folders with COCO annotations."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from pycocotools import mask as rle
from torch import Tensor

from ..run.errors import RunError
from ..run.images import BadImage, open_image
from ..run.order import Key, drawing_from, seed_of
from ..run.samples import Skipped, Views, first_readable
from . import coco
from .coco import Annotated, Annotations, View
from .options import Options
from .scenes import Scenes

PARTS = ("train", "val")
WORST_STRETCH = 0.02  # most difference in aspect ratio between an image and its annotations
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Sample(NamedTuple):
    image: Tensor  # (3, H, W) in 0 to 1
    target: dict[str, Tensor]  # boxes, labels, masks if asked for: what torchvision takes
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Folder:
    """Images on a disk, shrunk to a longest side."""

    images: list[Annotated]
    paths: list[Path]
    side: int

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, key: Key) -> View:
        annotated = self.images[key.index]
        notes: list[str] = []
        image = open_image(
            self.paths[key.index],
            "RGB",
            self.side,
            lambda stored: _is_annotated_upright(stored, annotated.size, notes),
        )
        if _stretch(image.size, annotated.size) > WORST_STRETCH:
            got, wanted = ("×".join(map(str, size)) for size in (image.size, annotated.size))
            raise BadImage(f"of another shape: {got} pixels, its annotations are for {wanted}")
        return View(_shrunk(image, self.side), annotated, tuple(notes))


def _is_annotated_upright(
    stored: Image.Image, annotated: tuple[int, int], notes: list[str]
) -> bool:
    """Whether the annotations fit the image turned by its EXIF tag, rather than as it is stored."""
    orientation = stored.getexif().get(ExifTags.Base.Orientation)
    if orientation not in range(2, 9):
        return True
    upright = stored.size[::-1] if orientation in SIDEWAYS else stored.size
    as_stored, as_shown = (_stretch(size, annotated) for size in (stored.size, upright))
    if as_stored == as_shown:
        notes.append(f"{coco.TURNED}: by EXIF orientation {orientation}; are its annotations, too?")
    return as_shown <= as_stored


def _stretch(size: tuple[int, int], wanted: tuple[int, int]) -> float:
    """By which share the aspect ratios of the two sizes differ."""
    return abs(size[0] * wanted[1] / (size[1] * wanted[0]) - 1)


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side:
        return image
    size = tuple(max(1, round(length * side / longest)) for length in image.size)
    return image.resize(size, Image.Resampling.BILINEAR)


class Data(NamedTuple):
    train: Scenes | Folder
    val: Scenes | Folder
    truth: Annotations  # of val
    skipped: list[Skipped]

    @property
    def classes(self) -> list[str]:
        return self.truth.classes


def prepare(options: Options) -> Data:
    """Returns the data that the options ask for."""
    if options.data is not None:
        return _folder(Path(options.data), options)
    train, val = digits(options)
    truth = coco.read(val.document(), "digits", options.masks)
    return Data(train, val, truth, truth.skipped)


def digits(options: Options) -> tuple[Scenes, Scenes]:
    side, seed, masks = options.image_size, options.seed, options.masks
    counts = (options.train_images, options.val_images)
    train, val = (Scenes(k, count, side, seed, masks) for k, count in enumerate(counts))
    return train, val


def _folder(top: Path, options: Options) -> Data:
    if not top.is_dir():
        raise RunError(f"--data must be a folder, got {top}")
    (train, known), (val, truth) = (_part(top, part, options) for part in PARTS)
    if known.classes != truth.classes:
        raise RunError(
            f"--data must have the same categories in both files, got {known.classes} "
            f"to train and {truth.classes} to measure on"
        )
    if all(is_crowd for image in train.images for is_crowd in image.crowds):
        raise RunError(
            f"--data must have objects to train on, got none in {top}" + coco.because(known.skipped)
        )
    return Data(train, val, truth, known.skipped + truth.skipped)


def _part(top: Path, part: str, options: Options) -> tuple[Folder, Annotations]:
    """The images of an annotation file that exist, and their annotations."""
    file = _annotation_file(top, part)
    found = coco.read(coco.load(file), file.name, options.masks)
    roots = [top / "images", top / "images" / part, *sorted(top.glob(f"{part}*/")), top]
    images, paths, skipped = [], [], found.skipped
    for image in found.images:
        path, reason = _located(image.name, roots)
        if path is None:
            skipped.append((f"{file.name}: {image.name}", reason))
        else:
            images.append(image)
            paths.append(path)
    if not images:
        raise RunError(
            f"--data must have images of {file} in {roots[0]}, got none of "
            f"{len(found.images)}{coco.because(skipped)}"
        )
    return Folder(images, paths, options.image_size), Annotations(found.classes, images, skipped)


def _annotation_file(top: Path, part: str) -> Path:
    """train.json beside images/, or COCO's own annotations/instances_train2017.json."""
    plain = [top / f"{part}.json", top / "annotations" / f"{part}.json"]
    found = [path for path in plain if os.path.isfile(path)][:1]
    found = found or sorted((top / "annotations").glob(f"instances_{part}*.json"))
    if len(found) != 1:
        raise RunError(
            f"--data must have {part}.json, or annotations/instances_{part}*.json, one of "
            f"them, got {' and '.join(path.name for path in found) or 'neither'} in {top}"
        )
    return found[0]


def _located(name: str, roots: Sequence[Path]) -> tuple[Path | None, str]:
    """Returns an image's path, or None and the reason why not."""
    reason = f"no such file: in {roots[0]}"
    for root in roots:
        path = root / name
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path, ""
            reason = f"not a regular file: {path}"
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            reason = f"{getattr(error, 'strerror', None) or error}: in {root}"
    return None, reason


def sample_of(
    image: Image.Image, annotated: Annotated, masks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its target as torchvision's detectors take them, without crowds."""
    single = [k for k, is_crowd in enumerate(annotated.crowds) if not is_crowd]
    scale = torch.tensor(image.size * 2) / torch.tensor(annotated.size * 2)
    boxes = torch.tensor([annotated.boxes[k] for k in single]).reshape(-1, 4) * scale
    labels = torch.tensor([annotated.labels[k] for k in single], dtype=torch.int64)
    target: dict[str, Any] = {"boxes": boxes, "labels": labels}
    if masks:
        target["masks"] = masks_of([annotated.outlines[k] for k in single], image.size)
    return image_of(image), target


def image_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def masks_of(outlines: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
    """(objects, H, W), 1 where an object covers more than half of a pixel, else 0."""
    masks = np.zeros((len(outlines), *size[::-1]), np.uint8)
    for mask, outline in zip(masks, outlines, strict=True):
        annotated = rle.decode(outline)
        if annotated.shape != mask.shape:
            smooth = Image.fromarray(255 * annotated).resize(size, Image.Resampling.BOX)
            annotated = np.asarray(smooth) > 127
        mask[:] = annotated
    return torch.from_numpy(masks)


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    width = image.shape[2]
    left, top, right, bottom = target["boxes"].unbind(1)
    flipped = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(2)
    return image.flip(2), flipped


@dataclass
class Training(Views):
    """Samples by `Key`. An image that cannot be read is replaced by the next that can."""

    options: Options

    def __getitem__(self, key: Key) -> Sample:
        index, view, skipped = first_readable(
            len(self), key.index, lambda k: self.source.load(Key(key.epoch, k)), self.source.name
        )
        skipped += [(self.source.name(index), note) for note in view.notes]
        image, target = sample_of(view.image, view.annotated, self.options.masks)
        with drawing_from(seed_of(self.options.seed, key.epoch, key.index)):
            if torch.rand(()) < self.options.flip:
                image, target = mirrored(image, target)
        return Sample(image, target, tuple(skipped))


class Batch(NamedTuple):
    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    skipped: tuple[Skipped, ...]


def collate(samples: Sequence[Sample]) -> Batch:
    skipped = tuple(entry for sample in samples for entry in sample.skipped)
    return Batch([s.image for s in samples], [s.target for s in samples], skipped)


class Measured(NamedTuple):
    """An evaluated image; `image` is None if it cannot be read."""

    number: int
    image: Tensor | None
    skipped: tuple[Skipped, ...]


class Evaluation(Views):
    """The evaluated images by index."""

    def __getitem__(self, number: int) -> Measured:
        name = self.source.name(number)
        try:
            view = self.source.load(Key(0, number))
        except BadImage as error:
            return Measured(number, None, ((name, str(error)),))
        return Measured(number, image_of(view.image), tuple((name, n) for n in view.notes))
