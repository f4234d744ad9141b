"""`python -m revbifpn_kernels.detect`: scenes, precision, runs, messages."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detections import STEPS, TINY, begun, detect
from pycocotools import mask as rle
from trainings import checkpoint, rows

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import coco, data, evaluate, options, scenes
from revbifpn_kernels.recipes.detect.loop import DetectorLoop
from revbifpn_kernels.recipes.run.order import Key

# What scripts read.
STEP_COLUMNS = (
    "step epoch loss loss_objectness loss_rpn_box_reg loss_classifier loss_box_reg loss_mask lr "
    "images_per_s data_share peak_mib"
).split()
AP_COLUMNS = (
    "step epoch seconds cpu_seconds AP AP50 AP75 AP_small AP_medium AP_large mask_AP mask_AP50 "
    "mask_AP75 mask_AP_small mask_AP_medium mask_AP_large"
).split()


@pytest.mark.parametrize("part", [0, 1])
def test_scenes_are_functions_of_their_seed_with_tight_boxes(part):
    objects = 0
    for seed in range(20):
        one, again = scenes.scene(seed, 128, part), scenes.scene(seed, 128, part)
        assert np.array_equal(np.array(one.image), np.array(again.image))
        assert one.annotations == again.annotations
        document = {
            "images": [{"id": 0, "file_name": "a", "width": 128, "height": 128}],
            "annotations": one.annotations,
            "categories": scenes.CATEGORIES,
        }
        image = coco.read(document, "", masks=True).images[0]
        masks = data.masks_of(image.outlines, image.size).numpy()
        for mask, (left, top, right, bottom) in zip(masks, image.boxes, strict=True):
            assert mask.any(0).nonzero()[0][[0, -1]].tolist() == [left, right - 1]
            assert mask.any(1).nonzero()[0][[0, -1]].tolist() == [top, bottom - 1]
        objects += len(image.boxes)
    assert objects > 40


def test_each_epoch_has_new_scenes_and_each_part_its_own():
    train, val = data.digits(options.parse(TINY))
    first = np.array(train.load(Key(0, 0)).image)
    assert np.array_equal(first, np.array(train.load(Key(0, 0)).image))
    for source, key in ((train, Key(1, 0)), (train, Key(0, 1)), (val, Key(0, 0))):
        assert not np.array_equal(first, np.array(source.load(key).image))
    assert val.document() == val.document()


def test_what_is_measured_on_was_not_trained_on():
    train, test = (
        {np.array(glyph).tobytes() for glyph in scenes._glyphs(part)[0]} for part in (0, 1)
    )
    assert not train & test and len(train) + len(test) > 1700
    for left, right in zip(scenes._photographs(0), scenes._photographs(1), strict=True):
        assert left.width + right.width == 640


def truth_and_found():
    """What a perfect detector finds in six scenes."""
    chosen = options.parse([*TINY, "--val-images=6", "--image-size=128"])
    truth = coco.read(data.digits(chosen)[1].document(), "digits", masks=True)
    found = {}
    for k, image in enumerate(truth.images):
        found[k] = {
            "boxes": torch.tensor(image.boxes).view(-1, 4),
            "labels": torch.tensor(image.labels, dtype=torch.int64),
            "scores": torch.ones(len(image.boxes)),
            "outlines": image.outlines,
        }
    return truth, found


def test_precision():
    truth, found = truth_and_found()
    perfect = evaluate.precisions(truth, found, masks=True)
    names = ("AP", "AP50", "AP_small", "mask_AP", "mask_AP75")
    assert all(perfect[name] == pytest.approx(1) for name in names)
    assert np.isnan(perfect["AP_large"])  # there are no such digits
    for one in found.values():
        one["boxes"] += 0.2 * (one["boxes"][:, 2:] - one["boxes"][:, :2]).repeat(1, 2)  # IoU 0.47
        one["outlines"] = [rle.encode(np.zeros((128, 128), np.uint8, "F"))] * len(one["boxes"])
    missed = evaluate.precisions(truth, found, masks=True)
    assert missed["AP50"] == missed["mask_AP50"] == 0
    none = {k: {key: t[:0] for key, t in one.items()} for k, one in found.items()}
    assert evaluate.precisions(truth, none, masks=False)["AP"] == 0
    # Images that were not read do not count.
    half = {k: one for k, one in truth_and_found()[1].items() if k < 3}
    assert evaluate.precisions(truth, half, masks=False)["AP"] == pytest.approx(1)


@pytest.mark.parametrize("extra", [("--masks", "--amp=bfloat16"), ("--eval-every=1",)])
def test_a_run(extra, tmp_path, capsys):
    detect(tmp_path, *extra)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("8 images per epoch to train on, 2 to measure on, 10 classes")
    pattern = r"AP50 [\d.–]+, AP [\d.–]+(, masks AP50 [\d.–]+, AP [\d.–]+)? in \d+ s"
    masks = re.fullmatch(pattern, out[-1]).group(1)
    assert bool(masks) == ("--masks" in extra)
    steps, scores = rows(tmp_path / "steps.csv"), rows(tmp_path / "precision.csv")
    assert list(steps[0]) == STEP_COLUMNS and list(scores[0]) == AP_COLUMNS
    assert int(steps[-1]["step"]) == int(scores[-1]["step"]) == STEPS
    total = sum(float(steps[-1][name] or 0) for name in STEP_COLUMNS if name.startswith("loss_"))
    assert float(steps[-1]["loss"]) == pytest.approx(total, rel=1e-4)
    assert len(scores) == (2 if "--eval-every=1" in extra else 1)
    assert float(scores[-1]["cpu_seconds"]) > 0 and bool(scores[-1]["mask_AP"]) == bool(masks)
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_frozen_parts_stay_as_they_are(tmp_path):
    start = begun(*TINY)[0].model.state_dict()
    kept = detect(tmp_path, "--freeze=stem,body.0", "--lattice=2^-12")
    for key, tensor in checkpoint(kept)["model"].items():
        is_frozen = key.startswith("backbone.model.body.0.")
        assert torch.equal(tensor, start[key]) == is_frozen, key


def batch_of(run, found) -> data.Batch:
    views = data.Training(found.train, run.options)
    return data.collate([views[Key(0, k)] for k in range(4)])


def test_a_few_scenes_are_learnt():
    """The losses of the same four scenes fall to less than half."""
    run, found = begun(*TINY, "--train-images=4", "--epochs=40", "--lr=4e-3")
    report = SimpleNamespace(run=run, skip=lambda found: None)
    loop = DetectorLoop(itertools.repeat(batch_of(run, found)), report, None, None, data=found)
    losses = []
    for _ in range(run.steps):
        losses.append(sum(float(loss) for loss in loop.advance().losses.values()))
        run.step += 1
    first, last = losses[0], losses[-1]
    assert last < first / 2


def test_reversible_and_stored_start_with_the_same_losses():
    losses = []
    for mode in ("--reversible", "--no-reversible"):
        run, found = begun(*TINY, mode)
        batch = batch_of(run, found)
        losses.append(run.model(batch.images, batch.targets))
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs=-1"], "--epochs must be a whole number from 0 on, got -1"),
        (["--batch-size=1"], "--batch-size must be a whole number from 2 on, got 1"),
        (["--batch-size=9"], "--batch-size must be at most the 8 training images, got 9"),
        (["--lr=nan"], "--lr must be a positive number, got nan"),
        (["--image-size=32"], "--image-size must be a whole number from 64 on, got 32"),
        (["--set=wide=3"], "--model, --set or --checkpoint: revbifpn_s0: no setting is called"),
        (["--set=in_chans=1"], "--set in_chans must be 3, got 1"),
        (["--set=num_classes=3"], "--set cannot change num_classes, got 3"),
        (["--freeze=bdy"], "--freeze must name parts of the model, such as stem, body"),
        (["--data=."], "--train-images counts scenes of digits, and goes without --data"),
        (["--checkpoint=none.pth"], "none.pth"),
        (["--write=.", "--data=."], "--write writes the digits, and goes without --data"),
        (["--resume=auto", "--out="], "--resume auto needs --out"),
        (["--draw=101"], "--draw must be a whole number from 0 to 100, got 101"),
        (["--checkpoint=train: none.pth"], "train: none.pth does not exist"),
        (["--write=."], "--write must be a new folder, got ."),
    ],
)
def test_messages(arguments, message, tmp_path, capsys):
    assert main([*TINY, f"--out={tmp_path / 'run'}", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("detect: ") and message in err
