"""`python -m revbifpn_kernels.train` on digits, from its options to the last line it prints."""

import re

import pytest
import sklearn.datasets
import torch
from helpers import same_bits
from safetensors.torch import load_file
from trainings import STEPS, TINY, assert_same_run, checkpoint, losses, rows, train

from revbifpn_kernels.recipes.classify import data, optimizers
from revbifpn_kernels.recipes.classify import options as train_options
from revbifpn_kernels.recipes.detect import options as detect_options
from revbifpn_kernels.recipes.run import command
from revbifpn_kernels.recipes.run.options import power, setting
from revbifpn_kernels.train import main

from .conftest import DRAWING


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="an extra")
    out = train(tmp_path / "run", "--tensorboard", "--log-every=3")
    said = capsys.readouterr().out
    assert re.fullmatch(r"test accuracy \d+\.\d % in \d+ s", said.splitlines()[-1])
    assert re.search(r"^waiting for images took \d+\.\d % of the steps$", said, re.MULTILINE)
    assert "140 images to train on, 20 to validate, 40 to test, 10 classes" in said
    assert re.search(r"^\d+ of 40 test images right, loss \d", said, re.MULTILINE)
    steps, epochs = rows(out / "steps.csv"), rows(out / "epochs.csv")
    assert list(steps[0]) == "step epoch loss gradient lr images_per_s data_share peak_mib".split()
    assert list(epochs[0]) == "step epoch train_loss val_loss val_accuracy seconds".split()
    assert [int(row["step"]) for row in steps] == [3, 4, 7, 8]  # each epoch's end has a row
    assert [int(row["epoch"]) for row in epochs] == [1, 2]
    assert all(float(row["images_per_s"]) > 0 and float(row["peak_mib"]) > 0 for row in steps)
    assert (out / "curves.png").stat().st_size > 1000
    assert list(out.glob("events.out.tfevents.*"))
    weights = load_file(out / "weights.safetensors")
    assert same_bits(dict(sorted(weights.items())), dict(sorted(checkpoint(out)["ema"].items())))


def test_the_same_seed_gives_the_same_bits_whatever_loads_the_images(trained, tmp_path):
    assert_same_run(train(tmp_path / "helped", *DRAWING, "--workers=2"), trained)
    other = train(tmp_path / "other", *DRAWING, "--seed=1", "--epochs=1")
    assert losses(other) != losses(trained)[: STEPS // 2]


def test_exact_has_the_bits_of_stored(tmp_path):
    options = ("--lattice=2^-12", "--log-every=1")
    exact = train(tmp_path / "exact", *options)
    stored = train(tmp_path / "stored", *options, "--no-reversible")
    assert_same_run(exact, stored)
    plain = train(tmp_path / "plain", "--log-every=1")
    assert losses(plain) == pytest.approx(losses(exact), rel=0.05)
    assert losses(plain) != losses(exact)


def test_accumulation_is_the_same_step_in_parts(tmp_path):
    options = ("--norm=group", "--opt=momentum", "--lr=0.01", "--log-every=1")
    whole = train(tmp_path / "whole", *options)
    parts = train(tmp_path / "parts", *options, "--accumulate=4")
    assert len(losses(whole)) == STEPS
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    one, other = (checkpoint(out)["model"] for out in (whole, parts))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--amp=bfloat16", "--channels-last", "--ema-decay=0", "--opt=lamb", "--clip-grad=0"],
        ["--amp=float16", "--drop-path=0.1", "--epochs=1"],
        ["--set=mode='nearest'", "--norm=group", "--set=in_chans=3", "--split-seed=4"],
        pytest.param(["--compile=eager", "--epochs=1"], marks=pytest.mark.slow),
        pytest.param(["--compile=eager", "--no-reversible"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_options_train(options, tmp_path):
    out = train(tmp_path, *options, "--log-every=1", "--lr=0.01", "--label-smoothing=0")
    # Evaluations change nothing: the weights written after them are those of the checkpoint.
    weights, kept = load_file(out / "weights.safetensors"), checkpoint(out)
    kept = kept["ema"] or kept["model"]
    assert same_bits(dict(sorted(weights.items())), dict(sorted(kept.items())))
    assert all(0 < float(row["val_loss"]) < 10 for row in rows(out / "epochs.csv"))
    assert sum(losses(out)[-2:]) < sum(losses(out)[:2])


def test_without_a_gpu_cuda_graph_trains_all_the_same(tmp_path):
    options = ("--epochs=1", "--drop-path=0.2", "--log-every=1")
    plain = train(tmp_path / "plain", *options)
    with pytest.warns(UserWarning, match="capture_step: .*must be on a GPU"):
        assert_same_run(train(tmp_path / "graph", *options, "--cuda-graph"), plain)


def test_the_default_digits_are_all_1797(monkeypatch):
    monkeypatch.setattr(data, "load_digits", sklearn.datasets.load_digits)
    found = data.digits(1, 32, 0)
    parts = [found.train, found.val, found.test]
    assert len({name for part in parts for name in part.names}) == 1797
    assert [len(part) for part in parts] == [1259, 179, 359]


def test_learning_rate_warms_up_and_falls(tmp_path):
    out = train(tmp_path, "--log-every=1", "--lr=0.004", "--min-lr=0.001")
    rates = [float(row["lr"]) for row in rows(out / "steps.csv")]
    assert rates[:3] == pytest.approx([0.001, 0.0025, 0.004])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.0013


def test_biases_and_norms_do_not_decay():
    options = train_options.parse([*TINY, "--weight-decay=0.1"])
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    groups = optimizers.optimizer_of(options, model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.1
    assert {decays[id(p)] for p in (model[0].bias, *model[1].parameters())} == {0}


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
        (["--batch-size=2000"], "--batch-size must be at most the 140 training images, got 2000"),
        (["--accumulate=3"], "--accumulate must divide --batch-size 32, got 3"),
        (["--accumulate=2", "--cuda-graph"], "--cuda-graph needs --accumulate 1, got 2"),
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


def test_a_missing_package_is_said_in_a_line(capsys):
    assert command.run_command("train", "no_such_package", None) == 1
    said = capsys.readouterr().err
    assert said.startswith("train: needs no_such_package: pip install ")
    assert said.endswith('".[train]" in a clone\n')


def test_a_module_of_ours_that_is_missing_is_no_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        command.run_command("train", "revbifpn_kernels.recipes.no_such", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(capsys):
    assert main([*TINY, "--device=cuda"]) == 1
    assert "--device cuda needs a GPU, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command_options, defaults",
    [
        (train_options, ["25 for digits, 300 for folder", "0.004 for digits, 0.001 for folder"]),
        (detect_options, ["8 for digits, 24 for coco", "0.003 for digits, 0.001 for coco"]),
    ],
    ids=["train", "detect"],
)
def test_help_names_every_default(command_options, defaults, capsys):
    with pytest.raises(SystemExit):
        command_options.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text and "--set NAME=VALUE" in text
    for default in defaults:
        assert f"(default: {default})" in text


def test_a_short_run_reaches_its_learning_rate():
    assert train_options.parse(["--data=.", "--epochs=3"]).warmup_epochs == pytest.approx(0.6)
    assert train_options.parse(["--data=."]).warmup_epochs == 5
    assert train_options.parse(["--epochs=3", "--warmup-epochs=2"]).warmup_epochs == 2


def test_answers_are_read_as_their_fields_are_annotated():
    chosen = train_options.parse(
        ["--lattice=2^-12", "--epochs=3", "--no-fsdp", "--freeze=stem, body"]
    )
    assert chosen.lattice == power("2**-12") == 2**-12 and chosen.epochs == 3
    assert chosen.freeze == ("stem", "body") and chosen.fsdp is False and chosen.compile is None
    assert train_options.parse(["--compile"]).compile == "inductor"
    assert setting("extra-silos=1,2") == ("extra_silos", (1, 2))
    settings = dict(train_options.parse(["--set=features=24"]).settings)
    assert settings["features"] == 24 and settings["in_chans"] == 1
    assert train_options.parse(["--model=revbifpn_s1"]).settings == ()
