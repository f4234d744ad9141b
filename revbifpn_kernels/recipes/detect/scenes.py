"""The embedded default: scikit-learn's handwritten digits on crops of its two photographs.

A scene is a function of its seed: a crop, and digits of any height from 16 to 80 pixels, each in a
colour that stands out, turned and slanted a little. Training and measuring share no digit, and no
pixel of the photographs: training has their left three fifths.
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from sklearn.datasets import load_digits, load_sample_images

from ..run.errors import RunError
from ..run.order import Key, seed_of
from ..run.samples import split
from . import coco

HEIGHTS = (16, 80)  # of digits, in pixels, drawn evenly on a logarithmic scale
MOST = 6  # digits per scene
EMPTY = 0.05  # share of scenes without digits
OVERLAP = 0.1  # largest share of a box that another may cover
CONTRAST = 0.3  # least difference in brightness of a digit and its background; 1: white to black
SHARES = (0.8, 0.2)  # of the digits, to train and to measure on
CUT = 0.6  # share of the photographs' width to train on
CATEGORIES = [{"id": k + 1, "name": str(k)} for k in range(10)]


class Scene(NamedTuple):
    image: Image.Image
    annotations: list[dict[str, Any]]  # COCO's, of image 0


@functools.cache
def _glyphs(part: int) -> tuple[list[Image.Image], list[int]]:
    """The digits of a part, cropped, 0 to 255, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    numbers = split(labels.tolist(), 0, SHARES)[part]
    glyphs = []
    for k in numbers:
        glyph = pixels[k].reshape(8, 8)
        rows, columns = ((glyph > 3).any(axis).nonzero()[0] for axis in (1, 0))
        glyph = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        glyphs.append(Image.fromarray(np.uint8(glyph * (255 / 16))))
    return glyphs, [int(labels[k]) for k in numbers]


@functools.cache
def _photographs(part: int) -> list[Image.Image]:
    found = []
    for pixels in load_sample_images().images:
        cut = round(CUT * pixels.shape[1])
        found.append(Image.fromarray(pixels[:, :cut] if part == 0 else pixels[:, cut:]))
    return found


def scene(seed: int, side: int, part: int) -> Scene:
    """The scene of a seed; `part` 0 is for training, 1 for measuring."""
    draw = np.random.default_rng(seed)
    canvas = _background(draw, side, part)
    count = 0 if draw.random() < EMPTY else draw.integers(1, MOST + 1)
    boxes: list[tuple[int, int, int, int]] = []
    annotations = []
    for _ in range(count):
        label, alpha = _digit(draw, side, part)
        place = _place(draw, boxes, alpha.shape, side)
        if place is None:
            continue
        x, y = place
        mask = _paste(draw, canvas, alpha, x, y)
        boxes.append((x, y, alpha.shape[1], alpha.shape[0]))
        for older in annotations:  # what is painted over no longer belongs to the digit beneath
            older["mask"] &= ~mask
        annotations.append({"label": label, "mask": mask})
    image = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
    visible = [a for a in annotations if a["mask"].any()]
    return Scene(image, [_annotation(k, **a) for k, a in enumerate(visible)])


def _background(draw: np.random.Generator, side: int, part: int) -> np.ndarray:
    choices = _photographs(part)
    photograph = choices[draw.integers(len(choices))]
    crop = round(min(photograph.size) * draw.uniform(0.3, 1.0))
    left, top = (draw.integers(length - crop + 1) for length in photograph.size)
    box = (left, top, left + crop, top + crop)
    pixels = np.asarray(photograph.resize((side, side), Image.Resampling.BILINEAR, box))
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels * draw.uniform(0.6, 1.1) + draw.uniform(-20, 40, 3)


def _digit(draw: np.random.Generator, side: int, part: int) -> tuple[int, np.ndarray]:
    """A label, and the digit's opacity in its tight box."""
    glyphs, labels = _glyphs(part)
    k = draw.integers(len(glyphs))
    height = math.exp(draw.uniform(*(math.log(min(h, 0.8 * side)) for h in HEIGHTS)))
    scale = height / glyphs[k].height
    size = (max(3, round(glyphs[k].width * scale * draw.uniform(0.85, 1.15))), round(height))
    glyph = glyphs[k].resize(size, Image.Resampling.BICUBIC)
    glyph = glyph.rotate(draw.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    alpha = ((np.asarray(glyph) / 255 - 0.25) / 0.35).clip(0, 1)
    rows, columns = ((alpha > 0.5).any(axis).nonzero()[0] for axis in (1, 0))
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return labels[k], alpha[:side, :side]


def _place(draw, boxes, shape: tuple[int, int], side: int) -> tuple[int, int] | None:
    """A random position that covers little of the other boxes; None after ten tries."""
    h, w = shape
    for _ in range(10):
        x, y = int(draw.integers(side - w + 1)), int(draw.integers(side - h + 1))
        if all(_shared((x, y, w, h), box) <= OVERLAP for box in boxes):
            return x, y
    return None


def _shared(one, other) -> float:
    """Intersection over the smaller box; boxes of COCO's form."""
    sides = [
        min(one[k] + one[k + 2], other[k] + other[k + 2]) - max(one[k], other[k]) for k in (0, 1)
    ]
    return max(0, sides[0]) * max(0, sides[1]) / min(one[2] * one[3], other[2] * other[3])


def _paste(draw, canvas: np.ndarray, alpha: np.ndarray, x: int, y: int) -> np.ndarray:
    """Paints a digit; returns its mask."""
    h, w = alpha.shape
    beneath = canvas[y : y + h, x : x + w]
    brightness = beneath.mean() / 255
    while True:
        colour = draw.uniform(0, 255, 3)
        if abs(colour.mean() / 255 - brightness) >= CONTRAST:
            break
    opacity = alpha[..., None] * draw.uniform(0.8, 1.0)
    beneath += opacity * (colour - beneath)
    mask = np.zeros(canvas.shape[:2], bool)
    mask[y : y + h, x : x + w] = alpha > 0.5
    return mask


def _annotation(number: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = (mask.any(axis).nonzero()[0] for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number + 1,
        "image_id": 0,
        "category_id": label + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
    }


@dataclass(frozen=True)
class Scenes:
    """Scenes by key, generated on demand: each epoch has new ones, evaluations use epoch 0."""

    part: int
    count: int
    side: int
    seed: int
    masks: bool = False

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"scene {index}"

    def scene(self, key: Key) -> Scene:
        return scene(seed_of(self.seed, self.part, key.epoch, key.index), self.side, self.part)

    def load(self, key: Key) -> coco.View:
        image, annotations = self.scene(key)
        images = [self.entry(key.index) | {"id": 0}]
        document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        return coco.View(image, coco.read(document, "digits", self.masks).images[0])

    def document(self, epoch: int = 0) -> dict[str, Any]:
        """An epoch's scenes as a COCO document."""
        annotations = []
        for k in range(self.count):
            for found in self.scene(Key(epoch, k)).annotations:
                annotations.append(found | {"image_id": k, "id": len(annotations) + 1})
        images = [self.entry(k) for k in range(self.count)]
        return {"images": images, "annotations": annotations, "categories": CATEGORIES}

    def entry(self, index: int) -> dict[str, Any]:
        name = f"{('train', 'val')[self.part]}-{index:05}.png"
        return {"id": index, "file_name": name, "width": self.side, "height": self.side}


def write(folder: Path, parts: dict[str, Scenes]) -> None:
    """Writes images/ and an annotation file per part, as `--data` reads them."""
    if folder.exists():
        raise RunError(f"--write must be a new folder, got {folder}, which exists")
    (folder / "images").mkdir(parents=True)
    for name, scenes in parts.items():
        for k in range(len(scenes)):
            file = folder / "images" / scenes.entry(k)["file_name"]
            scenes.scene(Key(0, k)).image.save(file)
        (folder / f"{name}.json").write_text(json.dumps(scenes.document()))
