"""Starting from a file of weights: a new head, frozen parts; what is exported computes the same."""

import importlib.util
import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import FEW, NUMBERS, TINY, checkpoint, train

from revbifpn_kernels import create_model, to_official
from revbifpn_kernels.recipes.classify import export as exporting
from revbifpn_kernels.recipes.classify.data import Sample
from revbifpn_kernels.recipes.classify.options import parse
from revbifpn_kernels.train import main


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with the same weights in each kind of file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    model = create_model("revbifpn_s0", num_classes=10, **NUMBERS)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
    torch.save(model.state_dict(), folder / "ours.pth")
    torch.save({"state_dict": to_official(model)}, folder / "official.pth.tar")
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "w.safetensors")
    return folder


@pytest.mark.parametrize("name", ["ours.pth", "official.pth.tar", "w.safetensors"])
def test_frozen_parts_stay_as_they_were_loaded(name, weights, tmp_path):
    start = load_file(weights / "w.safetensors")
    options = (f"--checkpoint={weights / name}", "--freeze=stem,body.0,neck", "--epochs=1")
    out = train(tmp_path, *options, "--drop-path=0.3")
    for weights_now in (checkpoint(out)["model"], load_file(out / "weights.safetensors")):
        for key, tensor in weights_now.items():
            is_frozen = key.startswith(("body.0.", "neck."))
            assert torch.equal(tensor, start[key]) == is_frozen, key
    assert not any(key.startswith(("body.0.", "neck.")) for key in checkpoint(out)["optimizer"])


@pytest.mark.filterwarnings("ignore:load_checkpoint. the classifier keeps")
def test_another_number_of_classes_gets_a_new_head(weights, images, tmp_path):
    options = [f"--data={images}", "--model=revbifpn_s0", "--freeze=body,neck,head", "--norm=batch"]
    trained = [*FEW, *options, f"--checkpoint={weights / 'ours.pth'}", f"--out={tmp_path / 'run'}"]
    assert main([*trained, "--epochs=1", "--lr=0.05", "--ema-decay=0"]) == 0
    now = load_file(tmp_path / "run" / "weights.safetensors")
    assert now["classifier.weight"].shape == (2, 24)
    start = load_file(weights / "w.safetensors")
    assert all(torch.equal(now[n], t) for n, t in start.items() if not n.startswith("classifier"))


def test_a_new_head_of_as_many_classes(weights, tmp_path):
    loaded = f"--checkpoint={weights / 'ours.pth'}"
    start = load_file(weights / "w.safetensors")["classifier.weight"]
    for options, is_kept in (((), True), (("--new-head",), False)):
        out = train(tmp_path / str(is_kept), loaded, "--epochs=0", *options)
        now = load_file(out / "weights.safetensors")["classifier.weight"]
        assert torch.equal(now, start) == is_kept


def test_weights_name_the_model_they_are_of(tmp_path, capsys):
    out = train(tmp_path / "run", "--epochs=0", "--set=mode='nearest'", "--norm=group")
    wrong = [*TINY, "--set=features=16", f"--checkpoint={out}/weights.safetensors"]
    assert main([*wrong, f"--out={tmp_path / 'tuned'}"]) == 1
    named = capsys.readouterr().err.rpartition("it was trained with ")[2]
    asked = [*TINY, "--set=mode='nearest'", "--norm=group"]
    assert parse(shlex.split(named)).settings == parse(asked).settings
    assert parse(shlex.split(named)).norm == "group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=nowhere.pth"], "--checkpoint: load_checkpoint: nowhere.pth does not exist"),
        (["--new-head"], "--new-head needs --checkpoint, got none"),
        (["--freeze=body,bdy"], "--freeze must name parts of the model, such as stem, body"),
        (["--freeze=body,neck,head,classifier"], "--freeze must leave parameters to train"),
        (["--set=features=16", "--checkpoint=OURS"], "--checkpoint: .* is not of this model"),
    ],
)
def test_what_cannot_be_started_from(options, message, weights, tmp_path, capsys):
    options = [option.replace("OURS", str(weights / "ours.pth")) for option in options]
    assert main([*TINY, f"--out={tmp_path}", *options]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exports_are_run_and_compared(weights, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="an extra")
    pytest.importorskip("onnxscript", reason="an extra")
    exported = tmp_path / "exported"
    loaded = f"--checkpoint={weights / 'official.pth.tar'}"
    train(tmp_path / "run", loaded, "--epochs=0", f"--export={exported}")
    assert "logits of 4 test images agree: network.pt2 to " in capsys.readouterr().out
    about = json.loads((exported / "network.json").read_text())
    assert about["classes"] == [str(k) for k in range(10)]
    assert about["mode"] == "L" and about["side"] == 32 and about["mean"] == [0.5]
    assert about["crop"] == 0.875 and about["interpolation"] == "bilinear"
    images = torch.randn(3, 1, 32, 32)
    model = create_model(
        "revbifpn_s0", 10, checkpoint=tmp_path / "run" / "weights.safetensors", **NUMBERS
    ).eval()
    program = torch.export.load(exported / "network.pt2").module()
    session = onnxruntime.InferenceSession(exported / "network.onnx")
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_an_export_that_computes_something_else_is_refused(weights, tmp_path, capsys, monkeypatch):
    def wrong(network, images, path):
        return network(images) + 1

    monkeypatch.setattr(exporting, "_through_onnx", wrong)
    monkeypatch.setattr(
        exporting, "_through_program", lambda network, images, path: network(images)
    )
    loaded = f"--checkpoint={weights / 'ours.pth'}"
    run = [*TINY, loaded, "--epochs=0", f"--out={tmp_path / 'run'}", f"--export={tmp_path / 'x'}"]
    assert main(run) == 1
    said = capsys.readouterr()
    assert "network.onnx must agree with the network to 0.0001" in said.err
    assert said.out.splitlines()[-1].startswith("test accuracy ")


def test_an_export_is_of_any_number_of_images_also_where_one_is_tested(monkeypatch, tmp_path):
    shapes = []

    def recorded(network, images, path):
        shapes.append(images.shape)
        return network(images)

    for name in ("_through_program", "_through_onnx"):
        monkeypatch.setattr(exporting, name, recorded)
    network = create_model("revbifpn_s0", 10, **NUMBERS)
    exporting.export(network, tmp_path, [Sample(torch.zeros(1, 32, 32), 0, 0, ())], ["caf\udce9"])
    assert shapes == [(4, 1, 32, 32)] * 2
    assert json.loads((tmp_path / "network.json").read_text())["classes"] == ["caf\udce9"]


def test_what_an_export_lacks_is_said_before_the_training(monkeypatch, tmp_path, capsys):
    run = [*TINY, f"--out={tmp_path / 'run'}"]
    (tmp_path / "file").touch()
    assert main([*run, f"--export={tmp_path / 'file'}"]) == 1
    assert "--export must be a folder to write to" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*run, f"--export={tmp_path / 'x'}"]) == 1
    assert "--export needs onnxscript: pip install onnxscript" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
