"""Files of weights: the authors' and ours, and files that are none."""

import pickle

import golden
import pytest
import torch
from tiny import tiny

from revbifpn_kernels import create_model, load_official, revbifpn_s0, to_official


@pytest.fixture(scope="module")
def official():
    shapes = golden.read("official_keys")["revbifpn_s0"]
    return {name: golden.weight(name, shape).float() for name, shape in shapes.items()}


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_there_and_back_without_a_copy(official):
    net = revbifpn_s0()
    load_official(net, official)
    back = to_official(net)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)
    assert back["head.fc.weight"] is net.classifier.weight


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("names", ["official", "ours"])
def test_files(official, tmp_path, suffix, names):
    source = revbifpn_s0()
    weights = official if names == "official" else source.state_dict()
    path = tmp_path / f"revbifpn_s0{suffix}"
    if suffix == ".safetensors":
        save_file = pytest.importorskip("safetensors.torch", reason="an extra").save_file
        save_file(dict(weights), path)
    else:
        torch.save(weights, path)
    net = revbifpn_s0(checkpoint=path)
    loaded = to_official(net) if names == "official" else net.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_nested_as_training_scripts_save_it(official, tmp_path):
    torch.save({"state_dict": official, "epoch": 3}, tmp_path / "last.pth")
    net = revbifpn_s0(checkpoint=str(tmp_path / "last.pth"))
    assert torch.equal(net.classifier.bias, official["head.fc.bias"])


def test_backbones_take_what_they_have(official):
    for options in ({"num_classes": 0}, {"num_classes": 0, "neck": False}):
        net = revbifpn_s0(**options)
        load_official(net, official)
        theirs = to_official(net)
        assert all(torch.equal(theirs[name], official[name]) for name in theirs)


def test_other_classes_keep_their_classifier(official):
    net = revbifpn_s0(num_classes=5)
    before = net.classifier.weight.clone()
    with pytest.warns(UserWarning, match="1000 classes and the model 5"):
        load_official(net, official)
    assert torch.equal(net.classifier.weight, before)
    assert torch.equal(
        to_official(net)["head.final_conv.norm.bias"], official["head.final_conv.norm.bias"]
    )


def test_frozen_norms_take_the_same_weights(official):
    class Frozen(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(channels))

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-3).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale[:, None, None] + shift[:, None, None]

    plain, frozen = revbifpn_s0(num_classes=0).eval(), revbifpn_s0(num_classes=0, norm_layer=Frozen)
    for net in (plain, frozen):
        load_official(net, official)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(frozen(image), plain(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def damaged(official, path, kind):
    torch.save(official, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "malicious":
        path.write_bytes(pickle.dumps({"rev_stack.1": Malicious()}))
    elif kind == "text":
        path.write_text("accuracy,1.0\n")
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "training state":
        torch.save({"epoch": 3, "model": official}, path)
    elif kind == "incomplete":
        torch.save(dict(list(official.items())[:-1]), path)
    elif kind == "more":
        torch.save(official | {"rev_stack.1.more": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "is damaged or no checkpoint"),
        ("malicious", "nothing of it was executed"),
        ("text", "no checkpoint"),
        ("list", "must hold tensors by name, got list"),
        ("training state", "must hold tensors by name, got dict of epoch, model"),
        ("incomplete", "lacks 1 of 1874 tensors"),
        ("more", "has 1 that the model lacks, such as rev_stack.1.more"),
    ],
)
def test_files_that_are_no_checkpoint(official, tmp_path, kind, message):
    path = tmp_path / "weights.pth.tar"
    damaged(official, path, kind)
    net = revbifpn_s0()
    before = state(net)
    with pytest.raises(ValueError, match=f"load_official: .*{message}"):
        load_official(net, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(ValueError, match=message):
        revbifpn_s0(checkpoint=path)


@pytest.mark.parametrize("size", ["revbifpn_s1", "revbifpn_s3"])
def test_checkpoints_of_another_size(size):
    shapes = golden.read("official_keys")[size]
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    net = revbifpn_s0()
    before = state(net)
    with pytest.raises(ValueError, match=f"not of this model.*it looks like {size}"):
        load_official(net, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_names_that_are_not_the_authors(tmp_path):
    net = tiny()
    with pytest.raises(ValueError, match="expected the authors' names.*got body.0"):
        load_official(net, net.state_dict())
    with pytest.raises(FileNotFoundError, match="load_checkpoint: there is no file"):
        create_model("revbifpn_s0", checkpoint=tmp_path / "none.pth")
