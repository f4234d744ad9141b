"""Average precision, as pycocotools counts it."""

import contextlib
import io
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..run.samples import Skipped, loader
from ..run.signals import Signals
from .coco import Annotations, bbox_of
from .data import Data, Evaluation
from .state import DetectorState

# pycocotools' first six numbers: over IoUs of 0.5 to 0.95, at 0.5 and at 0.75, and by area.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")

# What is found in an image: torchvision's boxes, labels and scores, in pixels of the annotations;
# with masks also outlines, as run lengths.
Found = dict[str, Any]


class Result(NamedTuple):
    precisions: dict[str, float]  # by name; "mask_AP" … with masks; NaN without such objects
    found: dict[int, Found]  # by the image's number
    skipped: list[Skipped]


@torch.no_grad()
def evaluate(run: DetectorState, data: Data, signals: Signals) -> Result | None:
    """Detects objects in the validation images, and scores those that can be read.

    Returns None if a signal came meanwhile.
    """
    options, found, skipped = run.options, {}, []
    run.model.eval()
    views = Evaluation(data.val)
    for batch in loader(views, options.workers, batch_size=options.batch_size, collate_fn=list):
        skipped += (entry for one in batch for entry in one.skipped)
        read = [one for one in batch if one.image is not None]
        if read:
            outputs = run.model([one.image.to(run.world.device) for one in read])
            for one, output in zip(read, outputs, strict=True):
                size = data.truth.images[one.number].size
                found[one.number] = _on_annotated_scale(output, one.image.shape[:0:-1], size)
        if signals.received is not None:
            return None
    return Result(precisions(data.truth, found, options.masks), found, skipped)


def _on_annotated_scale(output: Found, seen: tuple[int, int], annotated: tuple[int, int]) -> Found:
    """Copies an output to the CPU, scaled to the pixels of the annotations."""
    scaled = {key: output[key].cpu() for key in ("boxes", "labels", "scores")}
    scaled["boxes"] *= torch.tensor(annotated * 2) / torch.tensor(tuple(seen) * 2)
    if "masks" in output:
        # Run lengths at once: the masks of all images would not fit into memory.
        scaled["outlines"] = [_outline(mask, annotated) for mask in output["masks"]]
    return scaled


def _outline(mask: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of a mask of probabilities (1, H, W), resized to the annotated `size`."""
    if mask.shape[1:] != size[::-1]:
        mask = F.interpolate(mask[None], size[::-1], mode="bilinear")[0]
    return rle.encode(np.asfortranarray((mask[0] > 0.5).cpu().numpy().view(np.uint8)))


def precisions(truth: Annotations, found: dict[int, Found], masks: bool) -> dict[str, float]:
    """Average precisions by COCO's rules, on the images in `found`."""
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
        entries = _detections(found, kind)
        detections = known.loadRes(entries) if entries else COCO()
        counted = COCOeval(known, detections, kind)
        counted.params.imgIds = sorted(found)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return [float(value) if value >= 0 else float("nan") for value in counted.stats[:6]]


def _detections(found: dict[int, Found], kind: str) -> list[dict]:
    entries = []
    for number, one in found.items():
        for k, box in enumerate(one["boxes"].tolist()):
            entry = {"image_id": number, "category_id": int(one["labels"][k])}
            entry["score"] = float(one["scores"][k])
            if kind == "bbox":
                entry["bbox"] = bbox_of(box)
            else:
                entry["segmentation"] = one["outlines"][k]
            entries.append(entry)
    return entries
