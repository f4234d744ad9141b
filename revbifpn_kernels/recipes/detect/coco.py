"""COCO annotations, checked: what can be trained on, and what is left out, and why.

Images without objects are used: detectors learn from them, too. Boxes are cut off at the image's
edges. Left out are boxes without area or of unknown categories or images and, with masks, objects
without a usable outline. No image is opened. A reason is "kind: case"; the summary counts kinds.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from pycocotools import mask as rle

from ..run.errors import RunError
from .outlines import Unfit, is_number, run_lengths

LEAST_SIDE = 0.1  # pixels; smaller boxes have no area
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow refuses larger images
CUT, TURNED = "cut to the image", "turned upright"  # kinds of objects that are used, but changed
REQUIRED = ("images", "annotations", "categories")


@dataclass
class Annotated:
    """An image and its objects."""

    id: Any
    name: str
    width: int
    height: int
    boxes: list[tuple[float, ...]] = field(default_factory=list)  # left, top, right, bottom
    labels: list[int] = field(default_factory=list)  # from 1 on: 0 is the background
    areas: list[float] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    outlines: list[Any] = field(default_factory=list)  # run lengths; None without masks

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as Pillow has them."""
        return self.width, self.height


class View(NamedTuple):
    """An image, perhaps shrunk, and its objects in pixels of the annotations."""

    image: Image.Image
    annotated: Annotated
    notes: tuple[str, ...] = ()


@dataclass
class Annotations:
    """The usable part of a COCO document, and what was left out of it."""

    classes: list[str]
    images: list[Annotated]
    skipped: list[tuple[str, str]]

    def truth(self) -> dict[str, Any]:
        """The usable part as a document for pycocotools; ids are labels and image indices."""
        objects = [(k, i, n) for k, i in enumerate(self.images) for n in range(len(i.boxes))]
        annotations = [
            {
                "id": number,
                "image_id": k,
                "category_id": image.labels[n],
                "bbox": bbox_of(image.boxes[n]),
                "area": image.areas[n],
                "iscrowd": int(image.crowds[n]),
                "segmentation": image.outlines[n],
            }
            for number, (k, image, n) in enumerate(objects, 1)
        ]
        sizes = ({"width": image.width, "height": image.height} for image in self.images)
        images = [{"id": k} | size for k, size in enumerate(sizes)]
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
        return {"images": images, "annotations": annotations, "categories": categories}


def bbox_of(box: Sequence[float]) -> list[float]:
    """COCO's left, top, width, height of a box's edges."""
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def load(path: Path) -> dict[str, Any]:
    """The COCO document in a file; raises `RunError` if it is missing, not JSON or not COCO."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RunError(f"--data must have JSON in {path}, got: {error}") from error
    entries = document if isinstance(document, dict) else {}
    missing = [key for key in REQUIRED if not isinstance(entries.get(key), list)]
    if missing:
        raise RunError(
            f"--data must have lists {', '.join(REQUIRED)} in {path}, got none of "
            f"{', '.join(missing)}"
        )
    return document


def read(document: dict[str, Any], where: str, masks: bool) -> Annotations:
    """Returns the usable part of a document; `where` names it in messages."""
    classes, label_of = _categories(document["categories"], where)
    images, skipped = _images(document["images"], where)
    for k, entry in enumerate(document["annotations"]):
        entry = entry if isinstance(entry, dict) else {}
        name = f"{where}: annotation " + (repr(entry["id"]) if "id" in entry else f"no. {k}")
        image_id = entry.get("image_id")
        image = images.get(image_id) if isinstance(image_id, int | str) else None
        if image is None:
            skipped.append((name, f"image is unknown: {image_id!r}"))
            continue
        name += f" of {image.name}"
        try:
            note = _add(image, entry, label_of, masks)
        except Unfit as error:
            skipped.append((name, str(error)))
        else:
            skipped += [(name, note)] if note else []
    return Annotations(classes, list(images.values()), skipped)


def _categories(entries: list, where: str) -> tuple[list[str], dict[Any, int]]:
    try:
        pairs = sorted((entry["id"], str(entry["name"])) for entry in entries)
        label_of = {key: k + 1 for k, (key, _) in enumerate(pairs)}
    except (TypeError, KeyError) as error:
        raise RunError(
            f"--data must have categories with id and name in {where}, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not label_of or len(label_of) < len(pairs):
        raise RunError(
            f"--data must have categories, each id once, in {where}, got "
            f"{[key for key, _ in pairs]}"
        )
    return [name for _, name in pairs], label_of


def _images(entries: list, where: str) -> tuple[dict[Any, Annotated], list[tuple[str, str]]]:
    images: dict[Any, Annotated] = {}
    skipped = []
    for k, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        name, key = entry.get("file_name"), entry.get("id")
        sides = [entry.get("width"), entry.get("height")]
        shown = f"{where}: {name if _is_name(name) else f'image no. {k}'}"
        if not _is_name(name) or not isinstance(key, int | str):
            skipped.append((shown, f"without file_name or id: {name!r} and {key!r}"))
        elif key in images:
            skipped.append((shown, f"id is taken: {key!r} is that of {images[key].name}"))
        elif not all(is_number(side) and side >= 1 and side == int(side) for side in sides):
            skipped.append((shown, f"width and height must be whole numbers: {sides}"))
        elif sides[0] * sides[1] > MOST_PIXELS:
            skipped.append((shown, f"more than {MOST_PIXELS} pixels: {sides}"))
        else:
            images[key] = Annotated(key, name, *map(int, sides))
    return images, skipped


def _is_name(value: Any) -> bool:
    """Whether a file can have this name: JSON strings may contain lone surrogates."""
    try:
        return isinstance(value, str) and bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False


def _add(image: Annotated, entry: dict, label_of: dict[Any, int], masks: bool) -> str | None:
    """Adds an object to its image; returns what had to be changed, if anything."""
    category = entry.get("category_id")
    if not isinstance(category, int | str) or category not in label_of:
        raise Unfit(f"category is unknown: {category!r}")
    box, is_cut = _box(entry.get("bbox"), image)
    outline = run_lengths(entry.get("segmentation"), *image.size) if masks else None
    area = entry.get("area")
    if not is_number(area) or area <= 0:
        area = (box[2] - box[0]) * (box[3] - box[1]) if outline is None else rle.area(outline)
    image.boxes.append(box)
    image.labels.append(label_of[category])
    image.areas.append(float(area))
    image.crowds.append(entry.get("iscrowd") in (1, "1"))
    image.outlines.append(outline)
    return f"{CUT}: its box was {entry['bbox']}" if is_cut else None


def _box(given: Any, image: Annotated) -> tuple[tuple[float, ...], bool]:
    """Left, top, right, bottom inside the image; whether more than a pixel was cut off."""
    if not isinstance(given, list | tuple) or len(given) != 4 or not all(map(is_number, given)):
        raise Unfit(f"box must be four numbers: {given!r}")
    x, y, w, h = given
    if w < LEAST_SIDE or h < LEAST_SIDE:
        raise Unfit(f"box has no area: {list(given)}")
    box = (max(0.0, x), max(0.0, y), min(image.width, x + w), min(image.height, y + h))
    if box[2] - box[0] < LEAST_SIDE or box[3] - box[1] < LEAST_SIDE:
        raise Unfit(f"box is outside of the image: {list(given)} of {image.width}×{image.height}")
    # Annotators round, so a pixel over the edge is not worth a message.
    is_cut = max(abs(a - b) for a, b in zip(box, (x, y, x + w, y + h), strict=True)) > 1
    return tuple(map(float, box)), is_cut


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def is_used(reason: str) -> bool:
    """Whether an entry with this reason is used, but changed."""
    return _kind(reason) in (CUT, TURNED)


def summary(skipped: Iterable[tuple[str, str]]) -> str:
    """How often each kind of reason was found, most frequent first."""
    kinds = Counter(_kind(reason) for _, reason in skipped)
    return ", ".join(f"{count}× {kind}" for kind, count in kinds.most_common(5))


def because(skipped: Collection[tuple[str, str]]) -> str:
    """The end of an error message about too few images or objects: what was left out."""
    return f"; left out: {summary(skipped)}" if skipped else ""
