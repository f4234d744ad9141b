"""What a RevBiFPN refuses, and that nothing has changed then."""

import dataclasses

import pytest
import torch
from tiny import tiny

from revbifpn_kernels import SIZES, Config, DetectionBackbone, create_model, revbifpn_s0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"widths": (48, 60, 80, 160)}, "widths must be multiples of 16, got"),
        ({"widths": (48, 64, 80)}, "neck_widths must have an entry for each level"),
        ({"widths": 48}, "widths must have an entry"),
        ({"widths": (48,)}, "widths must have an entry .* at least 2"),
        ({"neck_widths": (48, 64, 128, 0)}, "neck_widths must be multiples of 16"),
        ({"kernels": (3, 4, 5, 5)}, "kernels must be odd"),
        ({"extra_kernels": (0, 0, 0, 1)}, "extra_kernels must be even"),
        ({"neck_kernel": 4}, "neck_kernel must be odd, got 4"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be in \[0, 1\)"),
        ({"drop_rate": float("nan")}, "drop_rate must be in"),
        ({"extra_silos": -1}, "extra_silos must be a whole number"),
        ({"extra_silos": 1.5}, "extra_silos must be a whole number"),
        ({"num_classes": -1}, "num_classes must be a whole number"),
        ({"in_chans": 0}, "in_chans must be a positive whole number"),
        ({"in_chans": 4}, r"in_chans must be 1 to widths\[0\] / 16 = 3, got 4"),
        ({"se_ratios": (2, 0, 0, 0)}, r"se_ratios must be in \[0, 1\]"),
        ({"expand_ratios": (0, 1, 1, 1)}, "expand_ratios must be positive"),
        ({"mode": "bicubic"}, "mode must be 'bilinear' or 'nearest', got 'bicubic'"),
        ({"lattice": 0.3}, "lattice must be a positive power of two"),
        ({"drop_rate": "a lot"}, "drop_rate must be in"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ValueError, match=f"RevBiFPN: .*{message}"):
        dataclasses.replace(SIZES["revbifpn_s0"], **options)


def test_lists_may_not_change_later():
    widths = [48, 64, 80, 160]
    config = Config(widths=widths)
    widths[0] = 1
    assert config.widths == (48, 64, 80, 160)


@pytest.mark.parametrize(
    "name, nearest", [("revbifpn_s7", "revbifpn_s"), ("RevBiFPN-S0", "revbifpn_s0")]
)
def test_unknown_models(name, nearest):
    with pytest.raises(ValueError, match=f"no model is called '{name}'; did you mean '{nearest}"):
        create_model(name)
    with pytest.raises(ValueError, match="expected one of .*revbifpn_s6"):
        create_model("resnet50")


def test_unknown_settings():
    with pytest.raises(ValueError, match="revbifpn_s0: no setting is called 'droprate'; did you"):
        revbifpn_s0(droprate=0.1)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 3, 31, 64), r"sides of at least 32 pixels, got \(2, 3, 31, 64\)"),
        ((2, 3, 64, 8), "sides of at least 32 pixels"),
        ((2, 1, 64, 64), r"shape \(N, 3, H, W\), got \(2, 1, 64, 64\)"),
        ((3, 64, 64), r"shape \(N, 3, H, W\), got \(3, 64, 64\)"),
        ((0, 3, 64, 64), "2 pixels or more in training"),
        ((1, 3, 32, 32), "2 pixels or more in training"),
    ],
)
def test_images(shape, message):
    with pytest.raises(ValueError, match=f"RevBiFPN: image must .*{message}"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_spoil_no_statistics(value):
    net = tiny()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    image = torch.randn(2, 3, 64, 64)
    image[1, 2, 3, 4] = value
    with pytest.raises(RuntimeError, match="image must be finite in training"):
        net(image)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    with torch.no_grad():
        assert net.eval()(image)[0].isfinite().all()  # evaluation passes it through


def test_models_without_a_head():
    net = tiny(num_classes=0)
    for call in (
        lambda: net.forward_features(torch.zeros(2, 3, 64, 64)),
        lambda: net.reset_classifier(3),
    ):
        with pytest.raises(RuntimeError, match="num_classes=0"):
            call()
    with pytest.raises(ValueError, match="global_pool must be 'avg', got 'max'"):
        tiny().reset_classifier(3, "max")


def test_detection_backbones():
    with pytest.raises(ValueError, match="model must have no head"):
        DetectionBackbone(tiny())
    with pytest.raises(ValueError, match=r"levels must be among 0 to 3, got \(2, 4\)"):
        DetectionBackbone(tiny(num_classes=0), levels=(2, 4))
