"""The models in timm: made, read, loaded, tapped as its own are."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm", reason="an extra")
import timm
from timm.models import create_feature_extractor, group_parameters

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


def test_without_pooling():
    net = timm.create_model(NAME, num_classes=0, global_pool="").eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(image), net.forward_features(image))
    net.reset_classifier(0, "avg")
    assert net(image).shape == (1, net.num_features)
    for classes, pool in ((5, ""), (5, "max"), (0, "max")):
        with pytest.raises(ValueError, match=f"global_pool must be 'avg', .*got '{pool}'"):
            net.reset_classifier(classes, pool)
        with pytest.raises(ValueError, match=f"global_pool must be 'avg', .*got '{pool}'"):
            timm.create_model(NAME, num_classes=classes, global_pool=pool)
    assert net.num_classes == 0


@pytest.mark.parametrize("indices", [(1, 3), (0,), 2])
def test_features_only(indices):
    net = timm.create_model(NAME, features_only=True, out_indices=indices).eval()
    maps = net(torch.randn(2, 3, 96, 64))
    widths, strides = net.feature_info.channels(), net.feature_info.reduction()
    expected = [(2, c, 96 // s, 64 // s) for c, s in zip(widths, strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    assert widths == {(1, 3): [64, 320], (0,): [48], 2: [128, 320]}[indices]


@pytest.mark.parametrize("feature_cls", ["hook", "list", "dict", "fx"])
def test_features_by_taking_layers_out(feature_cls):
    with pytest.raises(ValueError, match=f"feature_cls must be 'getter', got '{feature_cls}'"):
        timm.create_model(NAME, features_only=True, feature_cls=feature_cls)


def test_intermediates():
    net = timm.create_model(NAME, num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    last, maps = net.forward_intermediates(image, indices=[0, 2])
    assert torch.equal(last, net.forward_features(image))
    pyramid = net.pyramid(image)
    assert all(torch.equal(m, pyramid[k]) for m, k in zip(maps, (0, 2), strict=True))
    last, _ = net.forward_intermediates(image, stop_early=True)
    assert torch.equal(last, pyramid[-1])
    assert net.prune_intermediate_layers([0, 2]) == [0, 2]
    assert net.num_classes == 0 and not net.state_dict().keys() & {"classifier.weight"}
    assert len(net(image)) == 4


@pytest.mark.parametrize("coarse, blocks", [(False, 15), (True, 5)])
def test_groups_of_parameters(coarse, blocks):
    net = timm.create_model(NAME)
    groups = group_parameters(net, net.group_matcher(coarse=coarse))
    parts = [{name.split(".")[0] for name in names} for names in groups.values()]
    assert parts == [{"body"}] * blocks + [{"neck"}, {"head"}, {"classifier"}]
    assert {name for names in groups.values() for name in names} == {
        n for n, _ in net.named_parameters()
    }


@pytest.fixture(scope="module")
def source():
    return revbifpn_s0().eval()


@pytest.fixture(scope="module")
def path(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save({name: tensor.detach() for name, tensor in to_official(source).items()}, path)
    return str(path)


def test_official_files(source, path):
    image = torch.randn(1, 3, 64, 64)
    net = timm.create_model(NAME, checkpoint_path=path).eval()
    assert torch.equal(net(image), source(image))
    overlay = {"file": path}
    net = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert torch.equal(net.head.final.conv.weight, source.head.final.conv.weight)
    net = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
    ).eval()
    assert all(torch.equal(a, b) for a, b in zip(net(image), source.pyramid(image), strict=True))


def test_official_files_without_a_classifier_and_in_a_wrapper(source, path):
    net = timm.create_model(NAME, checkpoint_path=path, num_classes=0)
    assert torch.equal(net.head.final.norm.bias, source.head.final.norm.bias)
    backbone = timm.create_model(NAME, features_only=True)
    backbone.load_state_dict({f"model.{n}": w for n, w in torch.load(path).items()})
    name = "body.14.up.3_0.project.conv.weight"
    assert torch.equal(backbone.model.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize("kind", ["half", "foreign"])
def test_incomplete_files(path, tmp_path, kind, num_classes):
    weights = torch.load(path)
    weights = dict(list(weights.items())[::2]) if kind == "half" else {"foo": torch.zeros(1)}
    torch.save(weights, tmp_path / "some.pth")
    overlay = {"file": str(tmp_path / "some.pth")}
    with pytest.raises(ValueError, match="revbifpn_s0: the checkpoint is not of this model"):
        timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )


def test_gradient_checkpointing_is_the_engine():
    net = timm.create_model(NAME, reversible=False)
    assert not net.reversible
    net.set_grad_checkpointing()
    assert net.body.reversible and net.neck.reversible and net.head.reversible


def run_python(code):
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_registered_after_timm():
    run_python(f"import timm, revbifpn_kernels; assert timm.is_model('{NAME}')")


def test_registered_before_timm_which_is_not_imported_then():
    run_python(
        "import importlib.util, sys, revbifpn_kernels\n"
        "assert importlib.util.find_spec('timm') and importlib.util.find_spec('timm')\n"
        "assert not {'timm', 'torchvision', 'safetensors'} & set(sys.modules)\n"
        f"import timm; assert timm.is_model('{NAME}')"
    )


@pytest.mark.parametrize(
    "first", ["revbifpn_kernels", pytest.param("timm", marks=pytest.mark.slow)]
)
def test_an_old_timm_lacks_the_models_and_both_imports_go_on(first, tmp_path):
    (tmp_path / "timm.py").write_text("__version__ = '0.4.12'")
    second = {"revbifpn_kernels": "timm", "timm": "revbifpn_kernels"}[first]
    run_python(
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]}\n"
        "import warnings; warnings.simplefilter('error')\n"
        f"import {first}\n"
        "with warnings.catch_warnings(record=True) as warned:\n"
        "    warnings.simplefilter('always')\n"
        f"    import {second}\n"
        "assert 'must be >= 1.0.3, got 0.4.12' in str(warned[-1].message)"
    )


def test_what_timms_own_tests_read_of_the_configuration():
    net = timm.create_model(NAME)
    config = net.default_cfg
    assert config["first_conv"] == ()  # a name or a sequence of names of convolutions
    assert config["classifier"] + ".weight" in net.state_dict()
    assert config["pool_size"] == tuple(side // 32 for side in config["input_size"][1:])
    assert net.head_hidden_size == net.num_features == 1280


def test_timms_feature_extractor_takes_the_network_as_a_leaf():
    pytest.importorskip("torchvision", reason="an extra")
    net = timm.create_model(NAME, num_classes=3).eval()
    wrapped = torch.nn.Sequential(net, torch.nn.Softmax(dim=1)).eval()
    extractor = create_feature_extractor(wrapped, ["0"])
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(extractor(image)["0"], net(image))
    with pytest.raises(RuntimeError, match="RevBiFPN: torch.fx cannot trace it.*features_only"):
        create_feature_extractor(net, ["neck"])
