"""Images of every kind, folders of every state: trained on, or skipped by name."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import FEW, losses, write_images

from revbifpn_kernels.recipes.classify.augment import CentreSquare, for_training
from revbifpn_kernels.recipes.classify.data import Evaluation, Training, folder, listed
from revbifpn_kernels.recipes.classify.options import parse
from revbifpn_kernels.recipes.run.errors import RunError
from revbifpn_kernels.recipes.run.images import BadImage, open_image
from revbifpn_kernels.recipes.run.order import Key
from revbifpn_kernels.train import main

RAMP = np.linspace(0, 1, 24 * 32).reshape(24, 32)


def grey16(path):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)


def exif_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(path, exif=exif, quality=95)


def palette_with_transparency(path):
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").quantize(16)
    image.save(path, transparency=bytes(range(16)))


GOOD = {
    "grey.png": lambda p: Image.fromarray((RAMP * 255).astype(np.uint8)).save(p),
    "grey16.png": grey16,
    "float.tiff": lambda p: Image.fromarray(RAMP.astype(np.float32)).save(p),
    "cmyk.jpg": lambda p: Image.new("CMYK", (32, 24), (0, 255, 255, 0)).save(p),
    "palette.png": palette_with_transparency,
    "alpha.png": lambda p: Image.new("RGBA", (32, 24), (9, 9, 9, 0)).save(p),
    "bit.png": lambda p: Image.new("1", (32, 24), 1).save(p),
    "animated.gif": lambda p: Image.new("L", (32, 24)).save(
        p, save_all=True, append_images=[Image.new("L", (32, 24), 99)]
    ),
    "exif.jpg": exif_rotated,
    "one.png": lambda p: Image.new("RGB", (1, 1), (1, 2, 3)).save(p),
    "strip.png": lambda p: Image.new("RGB", (30_000, 1)).save(p),
    "tall.jpg": lambda p: Image.new("RGB", (9, 30_000)).save(p),
}


def truncated(path):
    Image.effect_noise((64, 64), 99).save(path)
    path.write_bytes(path.read_bytes()[:-900])


def vast(path):
    """A valid header of 30,000 by 30,000 pixels."""
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BAD = {
    "truncated.jpg": truncated,
    "corrupt.png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200))),
    "empty.png": lambda p: p.touch(),
    "text.jpg": lambda p: p.write_text("no image"),
    "vast.png": vast,
    "nan.tiff": lambda p: Image.fromarray((RAMP * np.nan).astype(np.float32)).save(p),
}
UNFIT = {  # told without opening them
    "pipe.png": os.mkfifo,
    "folder.png": lambda p: p.mkdir(),
    "dangling.png": lambda p: p.symlink_to("nowhere"),
    "notes.txt": lambda p: p.write_text("labels"),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_good_images(name, mode, tmp_path):
    GOOD[name](tmp_path / name)
    image = open_image(tmp_path / name, mode, 32)
    assert image.mode == mode
    assert CentreSquare(32)(image).size == (32, 32)
    if name in ("grey.png", "grey16.png", "float.tiff"):
        grey = np.asarray(image.convert("L")) / 255
        assert np.abs(grey - RAMP).max() <= 1 / 255
    if name == "exif.jpg":
        assert image.size == (24, 32)
        grey = np.asarray(image.convert("L")).astype(float)
        assert grey[:, 0].mean() > grey[:, -1].mean()  # the bottom row has become the left column


@pytest.mark.parametrize("name", [*BAD, "missing.png"])
def test_bad_images(name, tmp_path):
    BAD.get(name, lambda p: None)(tmp_path / name)
    with pytest.raises(BadImage):
        open_image(tmp_path / name)


def test_a_large_photograph_is_reduced_while_it_is_decoded(tmp_path):
    Image.new("RGB", (6000, 4000), (200, 10, 10)).save(tmp_path / "large.jpg")
    assert open_image(tmp_path / "large.jpg", side=32).size == (750, 500)


def test_training_among_bad_files(tmp_path, capsys):
    """Every kind in one folder, an empty class, one known in validation alone."""
    write_images(tmp_path / "data" / "train", ("cat", "dog", "eel"))
    write_images(tmp_path / "data" / "val", ("cat", "dog", "fox"), each=3)
    for name, write in (GOOD | BAD | UNFIT).items():
        for part in ("train/dog", "val/cat"):
            write(tmp_path / "data" / part / name)
    for file in (tmp_path / "data" / "train" / "eel").iterdir():
        file.unlink()
    options = [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}", "--augment=rand"]
    assert main([*FEW, *options, "--erasing=0.3", "--log-every=1", "--workers=1"]) == 0
    assert len(losses(tmp_path / "run")) == 6 and np.isfinite(losses(tmp_path / "run")).all()
    said = capsys.readouterr()
    skipped = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    names = {line.partition("\t")[0] for line in skipped}
    both = [f"{part}/{name}" for part in ("train/dog", "val/cat") for name in (*BAD, *UNFIT)]
    assert names == {*both, "train/eel/", "val/eel/", "val/fox/"}
    assert f"train: {len(names)} skipped, see skipped.txt" in said.err
    assert "train: skipped train/dog/pipe.png: not a regular file" in said.err
    assert "train: skipped train/eel/: no images; the class keeps its output" in said.err
    assert any(line.startswith("val/cat/vast.png\tDecompressionBombError") for line in skipped)
    assert "24 to validate, 24 to test (the same), 3 classes" in said.out
    assert " of 18 test images right" in said.out
    # A run that goes on knows what it has found, and opens no training image here.
    (tmp_path / "run" / "skipped.txt").open("a").write("half a li")
    assert main([*FEW, *options, "--erasing=0.3", "--augment=rand", "--resume=auto"]) == 0
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines() == skipped
    assert "train: skipped" not in capsys.readouterr().err
    (tmp_path / "run" / "skipped.txt").write_text("half a line alone")
    assert main([*FEW, *options, "--erasing=0.3", "--augment=rand", "--resume=auto"]) == 0
    count = len((tmp_path / "run" / "skipped.txt").read_text().splitlines())
    assert f"train: {count} skipped, see skipped.txt" in capsys.readouterr().err


@pytest.mark.parametrize("augment", ["none", "affine", "crop", "rand", "trivial"])
def test_images_of_all_shapes_fill_the_same_square(augment, tmp_path):
    for name in ("strip.png", "tall.jpg", "grey.png", "one.png"):
        GOOD[name](tmp_path / name)
        transform = for_training(parse(["--data=.", f"--augment={augment}"]), "RGB", 32)
        assert transform(open_image(tmp_path / name)).shape == (3, 32, 32)


def test_a_lost_disk_is_not_a_bad_file(tmp_path):
    top = write_images(tmp_path / "data")
    found = folder(str(top), 3, 32, 0)
    for file in top.glob("*/*.png"):
        file.unlink()
    with pytest.raises(RunError, match="--data must be readable, got 8 bad files in a row"):
        Training(found.train, None, 0)[Key(0, 3)]
    sample = Evaluation(found.val, None, torch.zeros(1))[0]
    assert sample.label == -1 and "FileNotFoundError" in sample.skipped[0][1]


def test_a_bad_file_is_replaced_by_the_next_with_its_label(tmp_path):
    top = write_images(tmp_path / "data", each=20)
    train = folder(str(top), 3, 32, 0).train
    last = max(k for k, label in enumerate(train.labels) if label == 0)
    train.paths[last].write_text("no image")
    sample = Training(train, for_training(parse(["--data=."]), "RGB", 32), 0)[Key(0, last)]
    assert sample.label == 1 and sample.skipped[0][0] == train.name(last)
    # Class names in the order of their labels, and images of the last class bright.
    assert [name.split("/")[0] for name in train.names[last : last + 2]] == ["cat", "dog"]
    means = [np.asarray(train.load(k)).mean() for k in (0, last + 1)]
    assert means[0] < 80 < 120 < means[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda top: None, "must have a folder for each class, got none"),
        (lambda top: (top / "train" / "a").mkdir(parents=True), r"must have val/ beside train/"),
        (lambda top: (top / "a").mkdir(), "must have images to train on, got none"),
        (lambda top: write_images(top, each=2), "images to val on, got none.*needs three of"),
    ],
)
def test_folders_without_images(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(RunError, match=message):
        folder(str(tmp_path), 3, 32, 0)


def test_folders_that_cannot_be_read_or_were_read_already_are_named(tmp_path, monkeypatch):
    top = write_images(tmp_path / "data")
    write_images(top / "cat", ("closed", "open"))
    (top / "cat" / "again").symlink_to(".")
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    files, skipped = listed(top, top, ["cat", "dog"], "RGB", 32)
    assert len(files.paths) == 6 + 6 + 6
    assert sorted(skipped) == [
        ("cat/again/", "a link to a folder that was read already"),
        ("cat/closed/", "Permission denied"),
    ]


def test_images_warn_of_nothing(tmp_path):
    palette_with_transparency(tmp_path / "p.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_image(tmp_path / "p.png")
    assert image.mode == "RGB" and not caught
