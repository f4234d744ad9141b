"""COCO annotations and images as they come: used, or left out by name; never a crash."""

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="an extra")
from PIL import Image
from pycocotools import mask as rle

from revbifpn_kernels.recipes.detect import coco, data
from revbifpn_kernels.recipes.run.errors import RunError

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


def _counts(counts):
    return {"size": [80, 100], "counts": counts}


@pytest.mark.parametrize(
    "bad, reason",
    [
        ({"bbox": [5, 5, 0, 9]}, "has no area"),
        ({"bbox": [5, 5, 9, -2]}, "has no area"),
        ({"bbox": [200, 5, 9, 9]}, "is outside of the image"),
        ({"bbox": [5, -50, 9, 9]}, "is outside of"),
        ({"bbox": [5, 5, 9]}, "must be four numbers"),
        ({"bbox": [5, 5, float("nan"), 9]}, "must be four numbers"),
        ({"bbox": None}, "must be four numbers: None"),
        ({"category_id": 2}, "category is unknown: 2"),
        ({"category_id": [3]}, "category is unknown: [3]"),
        ({"image_id": 99}, "image is unknown: 99"),
        ({"image_id": {}}, "image is unknown: {}"),
        ({"segmentation": []}, "outline is empty"),
        ({"segmentation": [[1, 2]]}, "outline is empty"),
        (
            {"segmentation": {"size": [9, 9], "counts": [0, 81]}},
            "outline is of another size: [9, 9]",
        ),
        ({"segmentation": {"size": [80, 100], "counts": [8000]}}, "outline is empty"),
        ({"segmentation": None}, "outline is unusable"),
        ({"segmentation": 5}, "outline is unusable"),
        ({"segmentation": [[10, 20, float("nan"), 20, 40, 60]]}, "must be lists of numbers"),
        ({"segmentation": [[10, 20, float("inf"), 20, 40, 60]]}, "must be lists of numbers"),
        ({"segmentation": [[10, 20, 1e9, 20, 40, 60]]}, "1000000000.0 is far outside"),
        ({"segmentation": [[10, 20, 40, -9000, 40, 60]]}, "-9000 is far outside"),
        ({"segmentation": [[10, 20, 40, 20, 40, 60], 5]}, "must be lists of numbers, got 5"),
        ({"segmentation": _counts([10, 100])}, "counts of 110 pixels of 8000"),
        ({"segmentation": _counts([10, 10**6])}, "counts of 1000010 pixels of 8000"),
        ({"segmentation": _counts([10, -5, 7995])}, "whole numbers from 0 on"),
        ({"segmentation": _counts([0.5, 7999.5])}, "whole numbers from 0 on"),
        ({"segmentation": _counts("zzzz1")}, "outline is unusable"),
        ({"segmentation": _counts("R")}, "end within a number"),
        ({"segmentation": _counts("0~")}, "characters such as '~'"),
        ({"segmentation": _counts("0\ud800")}, "characters such as"),
        (
            {"segmentation": _counts(rle.encode(np.ones((9, 9), np.uint8, "F"))["counts"])},
            "of 8000",
        ),
        ({"bbox": [10**400, 0, 9, 9]}, "must be four numbers"),
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
    assert "cut to the image: its box was [-20, 70, 150, 50]" in found.skipped[0][1]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (
            {"id": 7, "file_name": "b.png", "width": 9, "height": 9},
            "id is taken: 7 is that of a",
        ),
        ({"id": 8, "file_name": "b.png", "height": 9}, "must be whole numbers: [None, 9]"),
        ({"id": 8, "file_name": "b.png", "width": 9, "height": 0}, "must be whole numbers"),
        ({"id": 8, "file_name": "b.png", "width": 10**400, "height": 9}, "must be whole numbers"),
        (
            {"id": 8, "file_name": "b.png", "width": 10**9, "height": 9},
            "more than 178956970 pixels",
        ),
        ({"id": 8}, "without file_name or id"),
        ({"id": 8, "file_name": "\ud800", "width": 9, "height": 9}, "without file_name or id"),
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
        assert np.array_equal(data.masks_of(found.images[0].outlines, (100, 80)), pixels[None])


def test_crowds_are_measured_against_and_not_trained_on():
    found = coco.read(document(good(), good(iscrowd=1)), "train.json", masks=True)
    _, target = data.sample_of(Image.new("RGB", (100, 80)), found.images[0], masks=True)
    assert target["labels"].tolist() == [2] and target["masks"].shape == (1, 80, 100)
    assert [a["iscrowd"] for a in found.truth()["annotations"]] == [0, 1]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_packed_counts_are_read_as_pycocotools_does(share):
    pixels = np.asfortranarray(np.random.default_rng(0).random((80, 100)) < share).view(np.uint8)
    outline = coco.run_lengths(_counts(rle.encode(pixels)["counts"]), 100, 80)
    assert np.array_equal(rle.decode(outline), pixels)


@pytest.mark.parametrize("value, is_crowd", [(1, True), ("1", True), (0, False), ("0", False)])
def test_crowds_as_files_write_them(value, is_crowd):
    found = coco.read(document(good(iscrowd=value)), "train.json", masks=False)
    assert found.images[0].crowds == [is_crowd]


def test_reasons_are_counted_by_their_kind():
    flat, strange = (good(bbox=[k, 5, 0, 9]) for k in (1, 2)), (good(category_id=k) for k in (7, 8))
    cut = good(bbox=[-20, 70, 150, 50])
    found = coco.read(document(*flat, *strange, cut), "train.json", masks=False)
    counted = "2× box has no area, 2× category is unknown, 1× cut to the image"
    assert coco.summary(found.skipped) == counted
    assert [coco.is_used(reason) for _, reason in found.skipped] == [False] * 4 + [True]


@pytest.mark.parametrize("key", [[1], None, {}])
def test_categories_without_a_usable_id_are_refused(key):
    entries = document(categories=[{"id": key, "name": "dog"}, {"id": 2, "name": "cat"}])
    with pytest.raises(RunError, match="categories with id and name in train.json"):
        coco.read(entries, "train.json", masks=False)


def test_categories_are_labels_in_the_order_of_their_ids():
    found = coco.read(document(good(), good(category_id=1)), "train.json", masks=False)
    assert found.classes == ["cat", "dog"] and found.images[0].labels == [2, 1]
    truth = found.truth()
    assert [entry["category_id"] for entry in truth["annotations"]] == [2, 1]
    assert truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@pytest.mark.parametrize(
    "given, masks, area", [(7.5, True, 7.5), (None, False, 1200), (0, True, 600)]
)
def test_areas_are_those_of_the_file_or_else_of_the_outline_or_box(given, masks, area):
    triangle = [[10, 20, 40, 20, 10, 60]]
    entry = good(area=given, segmentation=triangle)
    image = coco.read(document(entry), "train.json", masks=masks).images[0]
    assert image.areas == [pytest.approx(area, rel=0.05)]
    truth = coco.read(document(entry), "train.json", masks=masks).truth()["annotations"][0]
    assert truth["area"] == image.areas[0] and truth["bbox"] == SQUARE
