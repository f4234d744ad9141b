"""Files of weights, with the authors' names and with ours, and files that are not checkpoints."""

import contextlib
import pickle
import traceback

import golden
import pytest
import torch
from tiny import TWO_LEVELS

from revbifpn_kernels import create_model, load_official, revbifpn_s0, to_official
from revbifpn_kernels.models import checkpoints

SMALL = TWO_LEVELS | {"features": 24, "extra_silos": 1}


def small(**options):
    return revbifpn_s0(**SMALL | options)


@pytest.fixture(scope="module")
def official():
    """All tensors as float, counters too, as casting a whole state_dict makes them."""
    tensors = to_official(small()).items()
    return {name: golden.weight(name, tensor.shape).float() for name, tensor in tensors}


@contextlib.contextmanager
def refused(net, message):
    """Expect a ValueError that leaves `net` as it is."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        yield raised
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_there_and_back_without_a_copy(official):
    net = small()
    load_official(net, official)
    back = to_official(net)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)
    assert back["head.fc.weight"] is net.classifier.weight


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors", ".SAFETENSORS"])
@pytest.mark.parametrize("names", ["official", "ours"])
def test_files(official, tmp_path, suffix, names):
    source = small()
    weights = official if names == "official" else source.state_dict()
    path = tmp_path / f"revbifpn_s0{suffix}"
    if suffix.lower() == ".safetensors":
        save_file = pytest.importorskip("safetensors.torch", reason="an extra").save_file
        save_file(dict(weights), path)
    else:
        torch.save(weights, path)
    net = small(checkpoint=path)
    loaded = to_official(net) if names == "official" else net.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_as_training_scripts_save_it(official, tmp_path, key, wrapper):
    saved = {key: {wrapper + name: tensor for name, tensor in official.items()}, "epoch": 3}
    torch.save(saved, tmp_path / "last.pth")
    net = small()
    load_official(net, saved)
    for loaded in (net, small(checkpoint=str(tmp_path / "last.pth"))):
        assert torch.equal(loaded.classifier.bias, official["head.fc.bias"])


def test_backbones_take_what_they_have(official):
    for options in ({"num_classes": 0}, {"num_classes": 0, "neck": False}):
        net = small(**options)
        load_official(net, official)
        theirs = to_official(net)
        assert all(torch.equal(theirs[name], official[name]) for name in theirs)


def test_other_classes_keep_their_classifier(official, tmp_path):
    torch.save(official, tmp_path / "s0.pth")
    with pytest.warns(UserWarning, match="keeps its initialisation.*1000 classes") as warned:
        small(num_classes=5, checkpoint=tmp_path / "s0.pth")
    assert warned[0].filename == __file__
    net = small(num_classes=5)
    before = net.classifier.weight.clone()
    with pytest.warns(UserWarning, match="1000 classes and the model 5") as warned:
        load_official(net, official)
    assert warned[0].filename == __file__
    assert torch.equal(net.classifier.weight, before)
    assert torch.equal(
        to_official(net)["head.final_conv.norm.bias"], official["head.final_conv.norm.bias"]
    )


@pytest.mark.parametrize("names", ["official", "ours"])
def test_a_classifier_that_was_taken_out_is_passed_over(official, names):
    net, source = small(), small()
    net.reset_classifier(0)
    load_official(source, official)
    weights = official if names == "official" else source.state_dict()
    checkpoints.fitting("test", net, weights, pytest.fail)
    load_official(net, official)
    assert torch.equal(net.head.final.norm.bias, source.head.final.norm.bias)


@pytest.mark.parametrize("classes", [1000, 5])
@pytest.mark.parametrize(
    "damage",
    [{"head.fc.bias": torch.zeros(7)}, {"head.fc.bias": None}, {"head.fc.weight": None}],
    ids=["seven", "no-bias", "no-weight"],
)
def test_damaged_classifiers(official, classes, damage):
    weights = {n: w for n, w in (official | damage).items() if w is not None}
    net = small(num_classes=classes)
    with refused(net, "not of this model: it .*classifier"):
        load_official(net, weights)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda w: w.numpy(), "must hold tensors by name"),
        (lambda w: None, "must hold tensors by name"),
        (lambda w: w.to_sparse(), "another kind.*floating-point, got torch.sparse_coo"),
        (lambda w: w.to("meta"), "another kind.*got meta"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "got quantized"),
        (lambda w: w.to(torch.complex64), "got complex"),
        (lambda w: w.to(torch.int8), "expected floating-point, got integer"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor|.*deprecated")
def test_tensors_that_are_none(official, spoil, message):
    name = "head.fc.weight"
    net = small()
    with refused(net, f"load_official: .*{message}"):
        load_official(net, official | {name: spoil(official[name])})


def test_sources_that_are_none(official):
    for source in ([1], 5, {**official, 5: torch.zeros(1)}):
        with pytest.raises(ValueError, match="the checkpoint must hold tensors by name, got"):
            load_official(small(), source)
    with torch.device("meta"):
        net = small()
    with pytest.raises(ValueError, match="model must hold memory, got one on the meta device"):
        load_official(net, official)
    with pytest.raises(TypeError, match="checkpoint must be a path or None, got int"):
        small(checkpoint=5)


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

    plain, frozen = small(num_classes=0).eval(), small(num_classes=0, norm_layer=Frozen)
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
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("accuracy,1.0\n")
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "training state":
        torch.save({"epoch": 3, "weights": official}, path)
    elif kind == "incomplete":
        torch.save(dict(list(official.items())[:-1]), path)
    elif kind == "more":
        torch.save(official | {"rev_stack.1.more": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "is damaged or not a checkpoint"),
        ("malicious", "nothing in it was executed"),
        ("empty", "is damaged or not a checkpoint"),
        ("text", "not a checkpoint"),
        ("list", "must hold tensors by name, got list"),
        ("training state", "must hold tensors by name, got dict of epoch, weights"),
        ("incomplete", r"lacks 1 of \d+ tensors, such as classifier.bias"),
        ("more", "has 1 that the model lacks, such as rev_stack.1.more"),
    ],
)
def test_files_that_are_no_checkpoint(official, tmp_path, kind, message):
    path = tmp_path / "weights.pth.tar"
    damaged(official, path, kind)
    net = small()
    with refused(net, f"load_official: .*{message}"):
        load_official(net, path)
    with pytest.raises(ValueError, match=message) as raised:
        small(checkpoint=path)
    assert "Re-running" not in "".join(traceback.format_exception(raised.value))  # unsafely


@pytest.mark.parametrize(
    "width, hint", [(64, "it looks like revbifpn_s1"), (80, "its finest stream has 80 channels")]
)
def test_checkpoints_of_another_size(width, hint):
    weights = to_official(small(widths=(width, 16)))
    net = small()
    with refused(net, f"not of this model.*{hint}"):
        load_official(net, weights)


def test_other_kernels_are_no_other_size(official):
    with pytest.raises(ValueError, match="another shape") as raised:
        load_official(small(kernels=(3, 3)), official)
    assert "looks like" not in str(raised.value)


def test_names_that_are_not_the_authors(tmp_path):
    net = small()
    with pytest.raises(ValueError, match="expected the authors' names.*got body.0"):
        load_official(net, net.state_dict())
    for path, message in (
        (tmp_path / "none.pth", "none.pth does not exist"),
        ("https://example.org/net.pth", "is an address; download it first"),
        (tmp_path, "is a dir"),
    ):
        with pytest.raises(FileNotFoundError, match=f"load_checkpoint: .*{message}"):
            create_model("revbifpn_s0", checkpoint=path)
