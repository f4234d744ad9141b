"""Average precision, as pycocotools counts it."""

import contextlib
import io
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..train.data import Skipped
from ..train.order import Key
from ..train.pictures import BadPicture
from .coco import Annotations
from .data import Data, sample_of
from .run import Run

MOST = 100  # detections of an image that count
# Names of pycocotools' first six numbers: over IoUs of 0.5 to 0.95, at one, and by area.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")

Found = dict[str, Tensor]  # boxes, labels, scores, perhaps masks: what torchvision returns


class Result(NamedTuple):
    precisions: dict[str, float]  # by name; "mask_AP" … with masks; NaN without such objects
    found: dict[int, Found]  # by the image's number
    skipped: list[Skipped]


def evaluate(run: Run, data: Data) -> Result:
    """Detect on all images to measure on, and compare; those that cannot be read do not count."""
    found, skipped = {}, []
    run.model.eval()
    for start in range(0, len(data.val), run.options.batch_size):
        images, numbers = [], []
        for number in range(start, min(start + run.options.batch_size, len(data.val))):
            try:
                picture, annotated = data.val.load(Key(0, number))
            except BadPicture as error:
                skipped.append((data.val.name(number), str(error)))
            else:
                images.append(sample_of(picture, annotated, masks=False)[0].to(run.device))
                numbers.append(number)
        if images:
            with torch.no_grad():
                outputs = run.model(images)
            found |= dict(zip(numbers, map(_kept, outputs), strict=True))
    return Result(precisions(data.truth, found, run.options.masks), found, skipped)


def _kept(output: Found) -> Found:
    """On the CPU in full precision; masks are thresholded, as bytes."""
    kept = {key: t.cpu() if key == "labels" else t.float().cpu() for key, t in output.items()}
    if "masks" in kept:
        kept["masks"] = (kept["masks"][:, 0] > 0.5).to(torch.uint8)
    return kept


def precisions(truth: Annotations, found: dict[int, Found], masks: bool) -> dict[str, float]:
    """By COCO's rules, on the images in `found`."""
    if not found:
        return dict.fromkeys(NAMES, float("nan"))
    kinds = {"": "bbox"} | ({"mask_": "segm"} if masks else {})
    return {
        prefix + name: value
        for prefix, kind in kinds.items()
        for name, value in zip(NAMES, _summary(truth, found, kind), strict=True)
    }


def _summary(truth: Annotations, found: dict[int, Found], kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports each of its steps
        known = COCO()
        known.dataset = truth.truth()
        known.createIndex()
        detections = known.loadRes(_detections(found, kind)) if _count(found) else COCO()
        counted = COCOeval(known, detections, kind)
        counted.params.imgIds = sorted(found)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return [float(value) if value >= 0 else float("nan") for value in counted.stats[:6]]


def _count(found: dict[int, Found]) -> int:
    return sum(len(one["scores"]) for one in found.values())


def _detections(found: dict[int, Found], kind: str) -> list[dict]:
    entries = []
    for number, one in found.items():
        for k, (x0, y0, x1, y1) in enumerate(one["boxes"].tolist()):
            entry = {
                "image_id": number,
                "category_id": int(one["labels"][k]),
                "score": float(one["scores"][k]),
            }
            if kind == "bbox":
                entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                entry["segmentation"] = rle.encode(np.asfortranarray(one["masks"][k].numpy()))
            entries.append(entry)
    return entries
