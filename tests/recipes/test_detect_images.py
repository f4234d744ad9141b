"""Images of any size and turn, under `revbifpn_kernels.detect`: shrunk, never enlarged."""

import json
import math

import numpy as np
import pytest
import torch
from detections import FEW, begun, detect, prepared
from PIL import ExifTags, Image
from pycocotools import mask as rle
from trainings import rows

from revbifpn_kernels.recipes.detect import data, draw, evaluate
from revbifpn_kernels.recipes.run.order import Key
from revbifpn_kernels.recipes.run.signals import Signals


def folder(top, *sizes, name="{}.png", classes=("x",), **image):
    """Images with an object in their middle; `sizes` are those that are annotated."""
    (top / "images").mkdir(parents=True)
    entries = {"images": [], "annotations": []}
    for k, (width, height) in enumerate(sizes):
        file = name.format(k)
        Image.new("RGB", image.get("stored", (width, height)), "gray").save(
            top / "images" / file, exif=image.get("exif", Image.Exif())
        )
        entries["images"].append({"id": k, "file_name": file, "width": width, "height": height})
        left, right, upper, lower = width / 4, width / 2, height / 4, height / 2
        box, corners = [left, upper, right - left, lower - upper], [left, upper, right, upper]
        outline = [[*corners, right, lower, left, lower]]
        known = {"bbox": box, "segmentation": outline, "category_id": 1}
        entries["annotations"].append({"id": k, "image_id": k} | known)
    entries["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
    for part in data.PARTS:
        (top / f"{part}.json").write_text(json.dumps(entries))
    return top


def options_of(top) -> list[str]:
    return [*FEW, f"--data={top}", "--masks", "--batch-size=2", "--flip=0"]


def test_large_photographs_are_shrunk_with_their_boxes_and_masks(tmp_path):
    top = folder(tmp_path, (6000, 4000), (6000, 4000), name="{}.jpg")
    chosen, found = prepared(*options_of(top))
    sample = data.Training(found.train, chosen)[Key(0, 0)]
    assert sample.image.shape == (3, 43, 64)
    scale = torch.tensor([64 / 6000, 43 / 4000] * 2)
    assert torch.equal(sample.target["boxes"], torch.tensor([[1500.0, 1000, 3000, 2000]]) * scale)
    covered = sample.target["masks"][0].nonzero()
    assert covered.amin(0).tolist() == [11, 16] and covered.amax(0).tolist() == [20, 31]


def test_small_images_are_not_enlarged(tmp_path):
    chosen, found = prepared(*options_of(folder(tmp_path, (60, 40), (60, 40), stored=(30, 20))))
    sample = data.Training(found.train, chosen)[Key(0, 0)]
    assert sample.image.shape == (3, 20, 30) and sample.target["masks"].shape == (1, 20, 30)
    assert sample.target["boxes"].tolist() == [[7.5, 5, 15, 10]]


def test_what_is_found_on_shrunk_images_is_measured_in_the_pixels_of_annotations(tmp_path):
    run, found = begun(*options_of(folder(tmp_path, (600, 402), (64, 40), (100, 300))))
    run.model = Perfect(found)
    with Signals() as signals:
        result = evaluate.evaluate(run, found, signals)
    assert result.precisions["AP"] == pytest.approx(1)
    assert result.precisions["mask_AP50"] == pytest.approx(1)
    assert result.precisions["mask_AP"] > 0.8  # on a sixth of the pixels
    assert [one["outlines"][0]["size"] for one in result.found.values()] == [
        *([402, 600], [40, 64], [300, 100])
    ]
    kept = [value for one in result.found.values() for value in one.values()]
    assert max(t.numel() for t in kept if isinstance(t, torch.Tensor)) == 4  # no dense masks


class Perfect(torch.nn.Module):
    """Finds the truth, in pixels of what it sees."""

    def __init__(self, found: data.Data) -> None:
        super().__init__()
        views = (found.val.load(Key(0, k)) for k in range(len(found.val)))
        targets = (data.sample_of(v.image, v.annotated, masks=True)[1] for v in views)
        self.left = iter(targets)

    def forward(self, images):
        for image in images:
            target = next(self.left)
            assert target["masks"].shape[1:] == image.shape[1:]
            masks = target.pop("masks")[:, None].float()
            yield target | {"masks": masks, "scores": torch.ones(len(masks))}


def test_a_line_of_pixels_is_trained_on(tmp_path):
    data = folder(tmp_path / "data", *[(2000, 1)] * 4)
    out = detect(tmp_path / "run", f"--data={data}", "--masks")
    assert math.isfinite(float(rows(out / "steps.csv")[-1]["loss"]))
    assert not (out / "skipped.txt").exists()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


@pytest.mark.parametrize(
    "stored, annotated, orientation, is_turned, is_noted",
    [
        ((60, 40), (60, 40), 6, False, False),
        ((60, 40), (40, 60), 6, True, False),
        ((60, 40), (60, 40), 3, True, True),
        ((40, 40), (40, 40), 8, True, True),
        ((60, 59), (60, 59), 6, False, False),
        ((60, 59), (59, 60), 6, True, False),
        ((60, 40), (60, 40), 1, False, False),
        ((60, 40), (60, 40), 77, False, False),
    ],
)
def test_images_lie_as_their_annotations_say(
    stored, annotated, orientation, is_turned, is_noted, tmp_path
):
    pixels = np.zeros((*stored[::-1], 3), np.uint8)
    pixels[0, 0] = 255
    top = folder(tmp_path, annotated)
    Image.fromarray(pixels).save(top / "images" / "0.png", exif=exif(orientation))
    view = prepared(*options_of(top))[1].train.load(Key(0, 0))
    assert view.image.size == annotated
    assert (np.array(view.image)[0, 0, 0] == 0) == is_turned
    assert bool(view.notes) == is_noted


def test_a_doubtful_turn_is_named_once(tmp_path, capsys):
    top = folder(tmp_path / "data", *[(40, 40)] * 4, name="{}.jpg", exif=exif(6))
    detect(tmp_path / "run", f"--data={top}")
    err = capsys.readouterr().err
    assert err.count("turned upright: by EXIF orientation 6") == 4
    assert err.endswith("detect: 4 changed, see skipped.txt: 4× turned upright\n")


def test_names_that_no_file_can_have_are_left_out(tmp_path, capsys):
    top = folder(tmp_path / "data", *[(64, 64)] * 5)
    document = json.loads((top / "train.json").read_text())
    document["images"][0]["file_name"] = "a" * 300
    document["images"][1]["file_name"] = "a\0b.png"
    document["images"][2]["file_name"] = "../images"
    document["images"] += [{"id": 9, "file_name": "4.png", "width": 64, "height": 64}]
    (top / "train.json").write_text(json.dumps(document))
    detect(tmp_path / "run", f"--data={top}", "--batch-size=2")
    err = capsys.readouterr().err
    assert "File name too long: in" in err and "null" in err and "not a regular file: " in err


@pytest.mark.parametrize("changed", [{"iscrowd": 1}, {"segmentation": [[9, 9, 30, 9, 30, 30]]}])
def test_changed_annotations_are_told_apart(changed, tmp_path):
    top = folder(tmp_path, *[(64, 64)] * 2)
    before = begun(*options_of(top))[0].digest
    assert begun(*options_of(top))[0].digest == before
    document = json.loads((top / "train.json").read_text())
    document["annotations"][0] |= changed
    (top / "train.json").write_text(json.dumps(document))
    assert begun(*options_of(top))[0].digest != before


def test_names_of_classes_in_any_script_are_drawn_without_warnings(tmp_path, recwarn):
    _, found = prepared(*options_of(folder(tmp_path, (64, 64), classes=["猫 $x$"])))
    mask = np.asfortranarray(np.ones((64, 64), np.uint8))
    one = {"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.int64)}
    one |= {"scores": torch.ones(1), "outlines": [rle.encode(mask)]}
    assert draw.grid(found, {0: one}, 1).startswith(b"\x89PNG")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
