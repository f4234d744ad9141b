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
        ({"drop_rate": "a lot"}, "drop_rate must be in .*got 'a lot'"),
        ({"drop_rate": (0.1, 0.2)}, r"drop_rate must be in .*got \(0.1, 0.2\)"),
        ({"kernels": (3.0, 5, 5, 5)}, "kernels must be odd, got"),
        ({"kernels": (True, 5, 5, 5)}, "kernels must be odd, got"),
        ({"kernels": "3555"}, "kernels must be odd, got '3555'"),
        ({"neck_kernel": (5, 3)}, r"neck_kernel must be odd, got \(5, 3\)"),
        ({"features": 1280.0}, "features must be a positive whole number, got 1280.0"),
        ({"num_classes": True}, "num_classes must be a whole number from 0 on, got True"),
        ({"extra_silos": 2.0}, "extra_silos must be a whole number from 0 on, got 2.0"),
        ({"in_chans": (1, 2)}, r"in_chans must be a positive whole number, got \(1, 2\)"),
        ({"expand_ratios": (1, 1, 2, float("inf"))}, "expand_ratios must be positive"),
        ({"expand_ratios": (0.01, 1, 1, 1)}, "expand_ratios must leave a channel of 24"),
        ({"resolution": -5}, "resolution must be a whole number from 32 on, got -5"),
        ({"resolution": "x"}, "resolution must be a whole number from 32 on, got 'x'"),
        ({"neck": "yes"}, "neck must be True or False, got 'yes'"),
        ({"act_layer": None}, "act_layer must be a class or function .*got None"),
        ({"act_layer": torch.nn.ReLU()}, "act_layer must be a class or function .*got ReLU"),
        ({"norm_layer": "batch"}, "norm_layer must be a class or function .*got 'batch'"),
    ],
)
def test_settings(options, message):
    with pytest.raises(ValueError, match=f"RevBiFPN: .*{message}"):
        dataclasses.replace(SIZES["revbifpn_s0"], **options)


def test_numpys_numbers_are_numbers():
    numpy = pytest.importorskip("numpy", reason="an extra")
    config = Config(num_classes=numpy.int64(7), drop_rate=numpy.float32(0.5), kernels=[3, 5, 5, 5])
    assert type(config.num_classes) is int and type(config.drop_rate) is float


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
    with pytest.raises(ValueError, match=r"no model is called \[1\]"):
        create_model([1])
    with pytest.raises(TypeError, match="reversible must be True or False, got 'no'"):
        tiny(reversible="no")


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
        ((0, 3, 64, 64), "2 pixels or more in training.*got no image"),
        ((1, 3, 32, 32), "2 pixels or more in training"),
    ],
)
def test_images(shape, message):
    with pytest.raises(ValueError, match=f"RevBiFPN: image must .*{message}"):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    "image, message",
    [
        (None, "a tensor, got NoneType"),
        ([[0.0]], "a tensor, got list"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "floating-point, .*got torch.uint8"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.complex64), "floating-point, .*torch.complex64"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float64), "dtype torch.float32 .*torch.float64"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float16), "dtype torch.float32 .*torch.float16"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(TypeError, match=f"RevBiFPN: image must (be|have the model's) {message}"):
        tiny()(image)


def test_half_images_under_autocast_and_in_half_models():
    image = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny()(image).shape == (2, 10)
    assert tiny().bfloat16()(image).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (0, 3, 64, 64)])
def test_small_batches_are_refused_for_batch_norm_alone(shape):
    image = torch.zeros(shape)
    grouped, frozen = tiny(norm_layer=lambda c: torch.nn.GroupNorm(4, c)), tiny()
    for module in frozen.modules():
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    for net in (grouped, frozen):
        assert net.training and net(image).shape == (shape[0], 10)


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
    net.reset_classifier(0)  # there is nothing to take out
    for call in (
        lambda: net.forward_features(torch.zeros(2, 3, 64, 64)),
        lambda: net.reset_classifier(3),
    ):
        with pytest.raises(RuntimeError, match="num_classes=0"):
            call()
    with pytest.raises(ValueError, match="global_pool must be 'avg', got 'max'"):
        tiny().reset_classifier(3, "max")


@pytest.mark.parametrize("classes", [-1, 2.5, True, None])
def test_classes_that_cannot_be_counted(classes):
    net = tiny()
    with pytest.raises(ValueError, match=f"num_classes must be a whole .* got {classes}"):
        net.reset_classifier(classes)
    assert net.num_classes == net.classifier.out_features == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"levels": (2, 4)}, r"levels must be among 0 to 3, .*got \(2, 4\)"),
        ({"levels": 2}, "levels must be among 0 to 3, .*got 2"),
        ({"levels": ()}, r"levels must be .*got \(\)"),
        ({"out_channels": 0}, "out_channels must be a whole number from 1 on, got 0"),
        ({"extra": -1}, "extra must be a whole number from 0 on, got -1"),
    ],
)
def test_detection_backbones(options, message):
    with pytest.raises(ValueError, match=f"DetectionBackbone: {message}"):
        DetectionBackbone(tiny(num_classes=0), **options)


def test_detection_backbones_of_other_models():
    with pytest.raises(ValueError, match="model must have no head"):
        DetectionBackbone(tiny())
    with pytest.raises(TypeError, match="model must be a RevBiFPN, got Linear"):
        DetectionBackbone(torch.nn.Linear(1, 1))
