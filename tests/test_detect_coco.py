"""COCO annotations and pictures as they come: used, or left out by name; never a crash."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools", reason="an extra")
pytest.importorskip("torchvision", reason="an extra")
from detections import FEW, TINY, detect, said, write_digits
from PIL import Image
from pycocotools import mask as rle

from revbifpn_kernels.detect import coco, data, options
from revbifpn_kernels.detect.__main__ import main
from revbifpn_kernels.train.order import Key

pytestmark = pytest.mark.usefixtures("one_thread")
SQUARE = [10.0, 20.0, 30.0, 40.0]
POLYGON = [[10, 20, 40, 20, 40, 60, 10, 60]]


def document(*annotations, **entries):
    image = {"id": 7, "file_name": "a.png", "width": 100, "height": 80}
    return {
        "images": [image],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [{"id": k, "image_id": 7} | a for k, a in enumerate(annotations)],
    } | entries


def good(**changed):
    return {"bbox": SQUARE, "category_id": 3, "segmentation": POLYGON, "area": 1200.0} | changed


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"bbox": [5, 5, 0, 9]}, "has no area"),
        ({"bbox": [5, 5, 9, -2]}, "has no area"),
        ({"bbox": [200, 5, 9, 9]}, "is outside of 100×80 pixels"),
        ({"bbox": [5, -50, 9, 9]}, "is outside of"),
        ({"bbox": [5, 5, 9]}, "must be four numbers"),
        ({"bbox": [5, 5, float("nan"), 9]}, "must be four numbers"),
        ({"bbox": None}, "must be four numbers, got None"),
        ({"category_id": 2}, "category 2 is unknown"),
        ({"category_id": [3]}, "category [3] is unknown"),
        ({"image_id": 99}, "of image 99, which is not there"),
        ({"image_id": {}}, "of image {}, which is not there"),
        ({"segmentation": []}, "its outline"),
        ({"segmentation": [[1, 2]]}, "its outline"),
        ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, "not of 100×80 pixels"),
        ({"segmentation": {"size": [80, 100], "counts": [8000]}}, "its outline is empty"),
        ({"segmentation": None}, "its outline is unusable"),
        ({"segmentation": 5}, "its outline is unusable"),
    ],
)
def test_bad_objects_are_left_out_by_name(bad, reason):
    found = coco.read(document(good(), good(**bad), good()), "train.json", masks=True)
    assert len(found.images[0].boxes) == 2
    ((name, why),) = found.skipped
    assert name.startswith("train.json: annotation 1") and reason in why


def test_boxes_over_the_edge_are_cut_off():
    found = coco.read(document(good(bbox=[-20, 70, 150, 50])), "train.json", masks=False)
    assert found.images[0].boxes == [(0.0, 70.0, 100.0, 80.0)]
    assert "cut to the image, its box was [-20, 70, 150, 50]" in found.skipped[0][1]


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"id": 7, "file_name": "b.png", "width": 9, "height": 9}, "id 7 is that of a.png"),
        ({"id": 8, "file_name": "b.png", "height": 9}, "must be whole numbers, got [None, 9]"),
        ({"id": 8, "file_name": "b.png", "width": 9, "height": 0}, "must be whole numbers"),
        ({"id": 8}, "without file_name or id"),
        ("b.png", "without file_name or id"),
    ],
)
def test_bad_images_are_left_out_by_name(bad, reason):
    entries = document(good())
    entries["images"].append(bad)
    found = coco.read(entries, "train.json", masks=False)
    assert [image.name for image in found.images] == ["a.png"]
    assert reason in found.skipped[0][1]


def test_outlines_of_all_three_forms_give_the_same_masks():
    pixels = np.zeros((80, 100), np.uint8, order="F")
    pixels[20:60, 10:40] = 1
    packed = rle.encode(pixels)
    counts = [10 * 80 + 20, *[40] * 1]
    for _ in range(29):
        counts += [40, 40]
    counts.append(8000 - sum(counts))
    forms = (
        POLYGON,
        {"size": packed["size"], "counts": packed["counts"].decode()},
        {"size": [80, 100], "counts": counts},
    )
    for form in forms:
        found = coco.read(document(good(segmentation=form)), "train.json", masks=True)
        assert np.array_equal(found.images[0].mask, pixels[None])


def test_crowds_are_measured_against_and_not_trained_on():
    found = coco.read(document(good(), good(iscrowd=1)), "train.json", masks=True)
    _, target = data.sample_of(Image.new("RGB", (100, 80)), found.images[0], masks=True)
    assert target["labels"].tolist() == [2] and target["masks"].shape == (1, 80, 100)
    assert [a["iscrowd"] for a in found.truth()["annotations"]] == [0, 1]


def test_what_is_written_is_read_back_the_same(tmp_path):
    folder = write_digits(tmp_path / "digits")
    read = data.prepare(options.parse([f"--data={folder}", "--masks"]))
    made = data.prepare(options.parse([*TINY, "--masks"]))
    assert read.skipped == made.skipped == [] and read.classes == made.classes
    for ours, theirs in ((read.train, made.train), (read.val, made.val)):
        for k in range(len(theirs)):
            picture, annotated = ours.load(Key(0, k))
            again, same = theirs.load(Key(0, k))
            assert np.array_equal(np.array(picture), np.array(again))
            one, other = (data.sample_of(picture, a, masks=True)[1] for a in (annotated, same))
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_mirror_images():
    image = torch.arange(3 * 4 * 10.0).view(3, 4, 10)
    target = {"boxes": torch.tensor([[1.0, 0, 4, 2]]), "masks": torch.zeros(1, 4, 10)}
    target["masks"][:, :2, 1:4] = 1
    flipped, mirror = data.mirrored(image, target)
    assert torch.equal(flipped[..., 0], image[..., 9])
    assert mirror["boxes"].tolist() == [[6.0, 0.0, 9.0, 2.0]]
    assert mirror["masks"].nonzero()[:, 2].unique().tolist() == [6, 7, 8]


def test_a_folder_of_bad_files_is_trained_on(tmp_path, capsys):
    folder = write_digits(tmp_path / "digits")
    entries = json.loads((folder / "train.json").read_text())
    names = [image["file_name"] for image in entries["images"]]
    (folder / "images" / names[0]).unlink()
    (folder / "images" / names[1]).write_bytes(b"no picture")
    Image.new("RGB", (64, 300)).save(folder / "images" / names[2])
    Image.new("L", (32, 32)).save(folder / "images" / names[3])  # of the same shape: enlarged
    entries["annotations"] = [a for a in entries["annotations"] if a["image_id"] != 4]
    entries["annotations"].append({"id": 10**6, "image_id": 5, "bbox": [1, 1, 0, 0]})
    (folder / "train.json").write_text(json.dumps(entries))
    detect(tmp_path / "run", f"--data={folder}")
    err = said(capsys)[1]
    assert f"train.json: {names[0]}: no such file in {folder}/images" in err
    assert f"{names[1]}: UnidentifiedImageError" in err
    assert f"{names[2]}: 64×300 pixels, its annotations are for 64×64" in err
    assert "annotation 1000000" in err and names[3] not in err
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 4
    assert "detect: 4 skipped, see skipped.txt" in err


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: f / "none", "--data must be a folder, got"),
        (lambda f: (f / "val.json").unlink(), "--data must have val.json, or annotations/"),
        (lambda f: (f / "train.json").write_text("{"), "--data must have JSON in"),
        (lambda f: (f / "train.json").write_text("[]"), "lists images, annotations, categories"),
        (lambda f: _change(f, categories=[]), "must have categories, each id once"),
        (lambda f: _change(f, categories=[{"id": 1}]), "categories with id and name"),
        (lambda f: _change(f, categories=[{"id": 1, "name": "x"}]), "the same categories"),
        (lambda f: _change(f, annotations=[]), "must have objects to train on, got none"),
        (lambda f: _change(f, images=[]), "must have pictures of"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(break_it, message, tmp_path, capsys):
    folder = write_digits(tmp_path / "digits")
    changed = break_it(folder)
    chosen = changed if hasattr(changed, "is_dir") else folder
    assert main([*FEW, f"--data={chosen}", f"--out={tmp_path / 'run'}"]) == 1
    assert message in said(capsys)[1]


def _change(folder, **entries):
    path = folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
