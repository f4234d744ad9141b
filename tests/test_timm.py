"""The models in timm: made, read, loaded, tapped as its own are."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm", reason="an extra")
import timm

from revbifpn_kernels import revbifpn_s0, to_official

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "revbifpn_s0"


def test_names_and_configuration():
    assert [f"revbifpn_s{k}" for k in range(7)] == timm.list_models("revbifpn*")
    net = timm.create_model(NAME, num_classes=10, in_chans=1, drop_rate=0.1, drop_path_rate=0.2)
    assert net.pretrained_cfg["input_size"] == (3, 224, 224)
    assert net.get_classifier() is net.classifier and net.classifier.out_features == 10
    assert net.config.drop_path_rate == 0.2 and net.dropout.p == 0.1
    assert net(torch.randn(2, 1, 64, 64)).shape == (2, 10)


def test_features_and_head():
    net = timm.create_model(NAME, num_classes=0).eval()
    image = torch.randn(1, 3, 64, 64)
    features = net.forward_features(image)
    assert features.shape == (1, net.num_features, 2, 2)
    torch.testing.assert_close(net(image), features.mean((2, 3)))
    torch.testing.assert_close(net.forward_head(features, pre_logits=True), net(image))
    net.reset_classifier(5)
    assert net(image).shape == (1, 5)


@pytest.mark.parametrize("indices", [(1, 3), (0,), 2])
def test_features_only(indices):
    net = timm.create_model(NAME, features_only=True, out_indices=indices).eval()
    maps = net(torch.randn(2, 3, 96, 64))
    widths, strides = net.feature_info.channels(), net.feature_info.reduction()
    expected = [(2, c, 96 // s, 64 // s) for c, s in zip(widths, strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert widths == {(1, 3): [64, 320], (0,): [48], 2: [128, 320]}[indices]


def test_intermediates():
    net = timm.create_model(NAME, num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    last, maps = net.forward_intermediates(image, indices=[0, 2])
    assert torch.equal(last, net.forward_features(image))
    assert all(torch.equal(m, net.pyramid(image)[k]) for m, k in zip(maps, (0, 2), strict=True))


def test_official_files(tmp_path):
    source = revbifpn_s0()
    path = str(tmp_path / "official.pth")
    torch.save({name: t.detach() for name, t in to_official(source).items()}, path)
    image = torch.randn(1, 3, 64, 64)
    expected = source.eval()(image)
    net = timm.create_model(NAME, checkpoint_path=path).eval()
    assert torch.equal(net(image), expected)
    overlay = {"file": path}
    net = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert torch.equal(net.head.final.conv.weight, source.head.final.conv.weight)
    net = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
    ).eval()
    assert all(torch.equal(a, b) for a, b in zip(net(image), source.pyramid(image), strict=True))


def test_gradient_checkpointing_is_the_engine():
    net = timm.create_model(NAME, reversible=False)
    assert not net.reversible
    net.set_grad_checkpointing()
    assert net.body.reversible and net.neck.reversible and net.head.reversible


@pytest.mark.parametrize("first", ["revbifpn_kernels", "timm"])
def test_registered_whichever_is_imported_first(first):
    second = {"revbifpn_kernels": "timm", "timm": "revbifpn_kernels"}[first]
    code = f"import {first}, {second}, timm; assert timm.is_model('{NAME}')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_never_imported_by_us():
    code = (
        "import revbifpn_kernels, sys\n"
        "assert not {'timm', 'torchvision', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
