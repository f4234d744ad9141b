"""Images and targets by key, of generated scenes and of folders with COCO annotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..train.data import PATIENCE, Skipped
from ..train.order import Key, drawing_from, seed_of
from ..train.pictures import BadPicture, open_picture
from . import coco, scenes
from .coco import Annotated, Annotations
from .options import DetectError, Options

PARTS = ("train", "val")
WORST_STRETCH = 0.02  # between a picture's sides and those that its annotations name


class Sample(NamedTuple):
    image: Tensor  # (3, H, W) in 0 to 1
    target: dict[str, Tensor]  # boxes, labels, masks if asked for: what torchvision takes
    number: int  # of the image; that of a substitute, where it cannot be read
    skipped: tuple[Skipped, ...]


class Source(Protocol):
    def __len__(self) -> int: ...

    def load(self, key: Key) -> tuple[Image.Image, Annotated]: ...  # raises BadPicture

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Digits:
    """Scenes to train on: an epoch's are made when they are asked for."""

    scenes: scenes.Scenes
    masks: bool

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def load(self, key: Key) -> tuple[Image.Image, Annotated]:
        image, annotations = self.scenes.scene(key)
        document = {
            "images": [self.scenes.entry(key.index) | {"id": 0}],
            "annotations": annotations,
            "categories": scenes.CATEGORIES,
        }
        return image, coco.read(document, "digits", self.masks).images[0]


@dataclass(frozen=True)
class Folder:
    """Pictures on a disk."""

    images: list[Annotated]
    paths: list[Path]
    side: int

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, key: Key) -> tuple[Image.Image, Annotated]:
        annotated = self.images[key.index]
        picture = open_picture(self.paths[key.index], "RGB", self.side)
        wanted = (annotated.width, annotated.height)
        if picture.size != wanted:
            stretch = picture.width * annotated.height / (picture.height * annotated.width)
            if abs(stretch - 1) > WORST_STRETCH:
                got = "×".join(map(str, picture.size))
                raise BadPicture(f"{got} pixels, its annotations are for {wanted[0]}×{wanted[1]}")
            picture = picture.resize(wanted)
        return picture, annotated


class Data(NamedTuple):
    train: Source
    val: Source
    truth: Annotations  # of val
    skipped: list[Skipped]

    @property
    def classes(self) -> list[str]:
        return self.truth.classes


def prepare(options: Options) -> Data:
    """What the options ask for."""
    if options.data is not None:
        return _folder(Path(options.data), options)
    train, val = digits(options)
    truth = coco.read(val.document(), "digits", options.masks)
    return Data(Digits(train, options.masks), Digits(val, options.masks), truth, truth.skipped)


def digits(options: Options) -> tuple[scenes.Scenes, scenes.Scenes]:
    side = options.image_size
    counts = (options.train_images, options.val_images)
    train, val = (scenes.Scenes(k, count, side, options.seed) for k, count in enumerate(counts))
    return train, val


def _folder(top: Path, options: Options) -> Data:
    if not top.is_dir():
        raise DetectError(f"detect: --data must be a folder, got {top}")
    sources, truths, skipped = [], [], []
    for part in PARTS:
        file = _annotation_file(top, part)
        found = coco.read(coco.load(file), file.name, options.masks)
        skipped += found.skipped
        roots = [top / "images", top / "images" / part, *sorted(top.glob(f"{part}*/")), top]
        images, paths = [], []
        for image in found.images:
            path = next((r / image.name for r in roots if (r / image.name).is_file()), None)
            if path is None:
                skipped.append((f"{file.name}: {image.name}", f"no such file in {roots[0]}"))
            else:
                images.append(image)
                paths.append(path)
        if not images:
            raise DetectError(
                f"detect: --data must have pictures of {file} in {roots[0]}, got none of "
                f"{len(found.images)}"
            )
        sources.append(Folder(images, paths, options.image_size))
        truths.append(Annotations(found.classes, images, found.skipped))
    if truths[0].classes != truths[1].classes:
        raise DetectError(
            f"detect: --data must have the same categories in both files, got {truths[0].classes} "
            f"to train and {truths[1].classes} to measure on"
        )
    if not any(image.boxes for image in truths[0].images):
        raise DetectError(f"detect: --data must have objects to train on, got none in {top}")
    return Data(*sources, truths[1], skipped)


def _annotation_file(top: Path, part: str) -> Path:
    """train.json beside images/, or COCO's own annotations/instances_train2017.json."""
    candidates = [top / f"{part}.json", top / "annotations" / f"{part}.json"]
    candidates += sorted((top / "annotations").glob(f"instances_{part}*.json"))
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DetectError(
            f"detect: --data must have {part}.json, or annotations/instances_{part}*.json, got "
            f"neither in {top}"
        )
    return found


def sample_of(
    picture: Image.Image, annotated: Annotated, masks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The image and what torchvision's detectors are trained by; crowds are no objects."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    single = [k for k, is_crowd in enumerate(annotated.crowds) if not is_crowd]
    boxes = torch.tensor([annotated.boxes[k] for k in single]).reshape(-1, 4)
    labels = torch.tensor([annotated.labels[k] for k in single], dtype=torch.int64)
    target: dict[str, Any] = {"boxes": boxes, "labels": labels}
    if masks:
        target["masks"] = torch.from_numpy(annotated.mask[single])
    return image, target


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    width = image.shape[2]
    left, top, right, bottom = target["boxes"].unbind(1)
    flipped = target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(2)
    return image.flip(2), flipped


class Training(Dataset):
    """Samples by `Key`. In place of a picture that cannot be read stands the next that can."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        skipped = []
        for further in range(min(PATIENCE, len(self))):
            index = (key.index + further) % len(self)
            try:
                picture, annotated = self.source.load(Key(key.epoch, index))
            except BadPicture as error:
                skipped.append((self.source.name(index), str(error)))
                continue
            image, target = sample_of(picture, annotated, self.options.masks)
            with drawing_from(seed_of(self.options.seed, key.epoch, key.index)):
                if torch.rand(()) < self.options.flip:
                    image, target = mirrored(image, target)
            return Sample(image, target, index, tuple(skipped))
        raise DetectError(
            f"detect: --data must be readable, got {len(skipped)} bad files in a row, the last: "
            f"{': '.join(skipped[-1])}"
        )


class Batch(NamedTuple):
    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    skipped: tuple[Skipped, ...]


def collate(samples: Sequence[Sample]) -> Batch:
    skipped = tuple(entry for sample in samples for entry in sample.skipped)
    return Batch([s.image for s in samples], [s.target for s in samples], skipped)
