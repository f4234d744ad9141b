"""Folders of images as they come: used, or left out by name; never a crash."""

import json

import numpy as np
import pytest
import torch
from detections import FEW, TINY, detect, write_digits
from PIL import Image

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import data, options
from revbifpn_kernels.recipes.run.order import Key

KIND = {"category_id": 1}
FLAT = [{"image_id": k, "bbox": [1, 1, 0, k]} | KIND for k in range(2)]
NARROW = [
    {"id": k, "file_name": f"train-0000{k}.png", "width": 64 * (k < 2), "height": 64}
    for k in range(4)
]


def test_what_is_written_is_read_back_the_same(tmp_path):
    folder = write_digits(tmp_path / "digits")
    read = data.prepare(options.parse([f"--data={folder}", "--masks"]))
    made = data.prepare(options.parse([*TINY, "--masks"]))
    assert read.skipped == made.skipped == [] and read.classes == made.classes
    for ours, theirs in ((read.train, made.train), (read.val, made.val)):
        for k in range(len(theirs)):
            image, annotated, _ = ours.load(Key(0, k))
            again, same, _ = theirs.load(Key(0, k))
            assert np.array_equal(np.array(image), np.array(again))
            one, other = (data.sample_of(image, a, masks=True)[1] for a in (annotated, same))
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
    (folder / "images" / names[1]).write_bytes(b"no image")
    Image.new("RGB", (64, 300)).save(folder / "images" / names[2])
    Image.new("L", (32, 32)).save(folder / "images" / names[3])  # of the same shape
    entries["annotations"] = [a for a in entries["annotations"] if a["image_id"] != 4]
    entries["annotations"].append({"id": 10**6, "image_id": 5, "bbox": [1, 1, 0, 0]} | KIND)
    entries["annotations"].append({"id": 10**7, "image_id": 6, "bbox": [50, 9, 40, 9]} | KIND)
    (folder / "train.json").write_text(json.dumps(entries))
    detect(tmp_path / "run", f"--data={folder}")
    err = capsys.readouterr().err
    assert f"train.json: {names[0]}: no such file: in {folder}/images" in err
    assert f"{names[1]}: UnidentifiedImageError" in err
    assert f"{names[2]}: of another shape: 64×300 pixels, its annotations are for 64×64" in err
    assert "skipped train.json: annotation 1000000" in err and names[3] not in err
    assert "changed train.json: annotation 10000000" in err
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 5
    assert "detect: 4 skipped, 1 changed, see skipped.txt: 1× " in err


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
        (
            lambda f: _change(f, categories=[{"id": [1], "name": "x"}]),
            "categories with id and name",
        ),
        (lambda f: _change(f, annotations=[]), "must have objects to train on, got none"),
        (lambda f: _change(f, annotations=FLAT), "; left out: 2× box has no area"),
        (lambda f: _change(f, images=[]), "must have images of"),
        (lambda f: _change(f, images=[{}] * 3), "got none of 0; left out: 20× image is unknown"),
        (lambda f: _change(f, images=NARROW), "at most the 2 training images, got 4; left out: "),
        (lambda f: _years(f), "got instances_train2014.json and instances_train2017.json in"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(break_it, message, tmp_path, capsys):
    folder = write_digits(tmp_path / "digits")
    changed = break_it(folder)
    chosen = changed if hasattr(changed, "is_dir") else folder
    assert main([*FEW, f"--data={chosen}", f"--out={tmp_path / 'run'}"]) == 1
    assert message in capsys.readouterr().err


def _change(folder, **entries):
    path = folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _years(folder):
    (folder / "annotations").mkdir()
    for year in (2014, 2017):
        target = folder / "annotations" / f"instances_train{year}.json"
        target.write_bytes((folder / "train.json").read_bytes())
    (folder / "train.json").unlink()
