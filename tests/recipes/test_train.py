"""`python -m revbifpn_kernels.train` on digits, from the command line to the last one of output."""

import re

import pytest
import torch
from helpers import same_bits
from safetensors.torch import load_file
from trainings import STEPS, TINY, assert_same_run, checkpoint, losses, rows, train

from revbifpn_kernels.recipes.classify import options as train_options
from revbifpn_kernels.recipes.detect import options as detect_options
from revbifpn_kernels.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="an extra")
    out = train(tmp_path / "run", "--tensorboard", "--log-every=3")
    said = capsys.readouterr().out
    assert re.fullmatch(r"test accuracy \d+\.\d % in \d+ s", said.splitlines()[-1])
    assert re.search(r"^waiting for images took \d+\.\d % of the steps$", said, re.MULTILINE)
    assert "1259 images to train on, 179 to validate, 359 to test, 10 classes" in said
    steps, epochs = rows(out / "steps.csv"), rows(out / "epochs.csv")
    assert [int(row["step"]) for row in steps] == [3, 4, 7, 8]  # each epoch's end is a row's
    assert [int(row["epoch"]) for row in epochs] == [1, 2]
    assert all(float(row["images_per_s"]) > 0 and float(row["peak_mib"]) > 0 for row in steps)
    assert (out / "curves.png").stat().st_size > 1000
    assert list(out.glob("events.out.tfevents.*"))
    weights = load_file(out / "weights.safetensors")
    assert same_bits(dict(sorted(weights.items())), dict(sorted(checkpoint(out)["ema"].items())))


def test_the_same_seed_gives_the_same_bits_whatever_loads_the_images(tmp_path):
    options = (
        "--augment=affine",
        "--mixup=0.2",
        "--cutmix=1",
        "--erasing=0.5",
        "--drop-path=0.2",
        "--drop=0.3",
    )
    alone = train(tmp_path / "alone", *options)
    helped = train(tmp_path / "helped", *options, "--workers=2")
    assert_same_run(alone, helped)
    other = train(tmp_path / "other", *options, "--seed=1")
    assert losses(alone) == losses(helped) != losses(other)


def test_exact_has_the_bits_of_stored(tmp_path):
    exact = train(tmp_path / "exact", "--lattice=2^-12")
    stored = train(tmp_path / "stored", "--lattice=2^-12", "--no-reversible")
    assert_same_run(exact, stored)
    plain = train(tmp_path / "plain")
    assert losses(plain) == pytest.approx(losses(exact), rel=0.05)
    assert losses(plain) != losses(exact)


def test_accumulation_is_the_same_step_in_parts(tmp_path):
    options = ("--norm=group", "--opt=momentum", "--lr=0.01", "--log-every=1")
    whole = losses(train(tmp_path / "whole", *options))
    parts = losses(train(tmp_path / "parts", *options, "--accumulate=4"))
    assert len(whole) == STEPS
    assert parts == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--amp=bfloat16", "--channels-last", "--ema-decay=0", "--opt=lamb", "--clip-grad=0"],
        ["--amp=float16", "--drop-path=0.1", "--epochs=1", "--batch-size=512"],
        ["--compile=eager", "--augment=affine"],
        ["--compile=eager", "--no-reversible", "--label-smoothing=0"],
        ["--set=mode='nearest'", "--norm=group", "--set=in_chans=3", "--split-seed=4"],
    ],
    ids=" ".join,
)
def test_options_train(options, tmp_path):
    curve = losses(train(tmp_path, *options, "--log-every=1"))
    assert curve[-1] < curve[0]


def test_learning_rate_warms_up_and_falls(tmp_path):
    out = train(tmp_path, "--log-every=1", "--lr=0.004", "--min-lr=0.001")
    rates = [float(row["lr"]) for row in rows(out / "steps.csv")]
    assert rates[:3] == pytest.approx([0.001, 0.0025, 0.004])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.0013


def test_memory_is_counted_beside_stored(capsys):
    assert main([*TINY, "--memory"]) == 0
    header, *table = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["images", "mode", "held", "MiB", "peak", "MiB"]
    assert [row[:2] for row in table[::2]] == [["2", "reversible"], ["16", "reversible"]]
    for reversible, stored in zip(table[::2], table[1::2], strict=True):
        assert float(reversible[2]) < float(stored[2]) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size=0"], "--batch-size must be a whole number from 1 on, got 0"),
        (["--batch-size=2000"], "--batch-size must be at most the 1259 training images, got 2000"),
        (["--accumulate=3"], "--accumulate must divide --batch-size 256, got 3"),
        (["--lr=nan"], "--lr must be a positive number, got nan"),
        (["--drop-path=1"], r"--drop-path must be in \[0, 1\), got 1.0"),
        (["--model=revbifpn_s9"], "no model is called 'revbifpn_s9'"),
        (["--set=width=(48, 16)"], "did you mean 'widths'"),
        (["--set=num_classes=3"], "--set cannot change num_classes, got 3"),
        (["--opt=adamm"], "--opt must be an optimizer of timm's"),
        (["--resume=auto"], "--resume auto needs --out"),
        (["--fsdp"], "--fsdp needs processes to shard over: torchrun"),
        (["--compile=nonsense"], "--compile must be one of .*inductor.*, got nonsense"),
        (["--out=/proc/x"], "--out must be a folder to write to, got /proc/x"),
        (["--data=nowhere"], "--data must be a folder, got nowhere"),
        (["--image-size=31"], "--image-size must be a whole number from 32 on, got 31"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *options]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("train: ") and "Traceback" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(capsys):
    assert main([*TINY, "--device=cuda"]) == 1
    assert "--device cuda needs a GPU, found none" in capsys.readouterr().err


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_is_not_overwritten(epochs, tmp_path, capsys):
    out = train(tmp_path / "run", f"--epochs={epochs}")
    assert main([*TINY, f"--out={out}"]) == 1
    assert "--out must be a new folder without --resume auto" in capsys.readouterr().err


@pytest.mark.parametrize("command", [train_options, detect_options])
def test_help_names_every_default(command, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text and "--set NAME=VALUE" in text
    for preset in command.PRESETS.values():
        assert f"{preset.lr} for" in text and f"{preset.epochs} for" in text


def test_a_short_run_reaches_its_learning_rate():
    assert train_options.parse(["--data=.", "--epochs=3"]).warmup_epochs == pytest.approx(0.6)
    assert train_options.parse(["--data=."]).warmup_epochs == 5
    assert train_options.parse(["--epochs=3", "--warmup-epochs=2"]).warmup_epochs == 2
