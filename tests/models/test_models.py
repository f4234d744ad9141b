"""RevBiFPN as a user has it: shapes, settings, gradients, statistics, memory, copies."""

import copy
import pickle
import zlib

import pytest
import torch
from helpers import same_bits
from tiny import NECK_WIDTHS, TWO_LEVELS, WIDTHS, tiny
from torch import nn

from revbifpn_kernels import SIZES, MBConv, create_model, revbifpn_s0
from revbifpn_kernels.mbconv.drop_path import DropPath

pytestmark = pytest.mark.usefixtures("one_thread")


def step(net, image, seed=1) -> dict[str, torch.Tensor]:
    """Outputs, parameters' gradients and buffers after a training step."""
    torch.manual_seed(seed)
    net.zero_grad()
    outputs = net(image)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    sum((k + 1) * (y * (y.detach() + k).cos()).mean() for k, y in enumerate(outputs)).backward()
    results = {f"output {k}": y.detach() for k, y in enumerate(outputs)}
    results |= {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return results | {name: b.clone() for name, b in net.named_buffers()}


def error(results, expected) -> float:
    """The largest of all results; gradients that are zero but for rounding count as small."""
    assert results.keys() == expected.keys() and results
    names = [name for name in results if expected[name].is_floating_point()]
    gradients = [name for name in names if "output" not in name and "running" not in name]
    scale = 1e-3 * max(expected[name].norm().item() for name in gradients)
    errors = [
        (results[name] - expected[name]).norm().item() / max(expected[name].norm().item(), scale)
        for name in names
    ]
    return max(errors)


def gradient_error(results, expected) -> float:
    """Of all gradients as one vector."""
    names = [n for n in expected if "output" not in n and "running" not in n and "num_" not in n]
    ours, theirs = (torch.cat([r[n].flatten() for n in names]) for r in (results, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


slow = pytest.mark.slow
OPTIONS = [
    {"drop_rate": 0.3, "drop_path_rate": 0.4},
    {"num_classes": 0, "neck": False},
    {"in_chans": 2, "mode": "nearest", "extra_silos": 0, "norm_layer": nn.BatchNorm2d},
    TWO_LEVELS | {"neck": False, "act_layer": nn.SiLU, "norm_layer": lambda c: nn.GroupNorm(4, c)},
    pytest.param({"num_classes": 0}, marks=slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_reversible_training_equals_stored_activations(options):
    net = tiny(**options).double()
    twin = copy.deepcopy(net)
    twin.reversible = False
    image = torch.randn(3, options.get("in_chans", 3), 64, 96, dtype=torch.float64)
    results = step(net, image)
    assert error(results, step(twin, image)) < 1e-8
    assert all(p.grad is not None for p in net.parameters()) or options.get("neck") is False


def test_running_statistics_move_once_in_neck_and_head():
    net = tiny()
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counts) > 100 and all(count == 1 for count in counts)


@pytest.mark.parametrize("side", [(32, 32), (64, 96), (100, 60), (33, 47), (225, 224)])
def test_pyramids_of_any_image(side):
    net = tiny(num_classes=0).eval()
    height, width = side
    with torch.no_grad():
        pyramid = net(torch.randn(1, 3, *side))
    expected = [
        (1, c, -(-height // s), -(-width // s))
        for c, s in zip(NECK_WIDTHS, (4, 8, 16, 32), strict=True)
    ]
    assert isinstance(pyramid, list) and [tuple(p.shape) for p in pyramid] == expected


def test_padding_is_zeros_at_the_right_and_bottom():
    net = tiny().eval()
    image = torch.randn(1, 3, 61, 62)
    with torch.no_grad():
        padded = nn.functional.pad(image, (0, 2, 0, 3))
        torch.testing.assert_close(net(image), net(padded), rtol=0, atol=0)


@pytest.mark.parametrize("in_chans", [1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_stem_is_space_to_depth_of_repeated_channels(in_chans, memory_format):
    stem = tiny(in_chans=in_chans, widths=(80, *WIDTHS[1:])).stem
    image = torch.randn(2, in_chans, 8, 12).contiguous(memory_format=memory_format)
    x = stem(image)
    assert x.shape == (2, 80, 2, 3)
    for p, q, k in ((0, 0, 0), (1, 2, 3), (3, 3, 4)):
        pixels = image[:, k % in_chans, p::4, q::4]
        assert torch.equal(x[:, (p * 4 + q) * 5 + k], pixels)
    assert torch.equal(stem.inverse(x), image)


def test_images_are_restored_from_streams():
    net = tiny(lattice=2.0**-12).eval()
    image = (torch.randn(2, 3, 64, 64) * 64).round() / 64
    with torch.no_grad():
        assert torch.equal(net.inverse(net.streams(image)), image)


def test_settings_reach_the_network():
    net = revbifpn_s0(
        num_classes=7, drop_rate=0.1, drop_path_rate=0.4, extra_silos=3, act_layer=nn.ReLU
    )
    assert net.classifier.out_features == 7 and net.dropout.p == 0.1
    assert len(net.body) == 3 * (3 + 3)
    assert not any(isinstance(module, nn.Hardswish) for module in net.modules())
    rates = [
        {m.probability for m in group.modules() if isinstance(m, DropPath)} for group in net.body
    ]
    assert [max(group) for group in rates] == pytest.approx(
        [0.4 * (k // 3 + 1) / 6 for k in range(18)]
    )
    new_level = net.body[2].down["0_1"]
    assert isinstance(new_level, MBConv) and not hasattr(new_level, "drop_path")
    assert create_model("revbifpn_s6").config is not SIZES["revbifpn_s6"]


def test_check_reaches_all_parts():
    net = tiny()
    net.check = True
    assert net.check and net.body.check and net.neck.check and net.head.check


def test_dropout_before_the_classifier():
    net = tiny(drop_rate=0.5, **TWO_LEVELS)
    features = torch.ones(2, net.num_features, 2, 2)
    dropped = net.forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (net.eval().forward_head(features, pre_logits=True) == 1).all()


def test_reset_classifier():
    net = tiny().eval().double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    features = net.forward_features(image)
    net.reset_classifier(0)
    torch.testing.assert_close(net(image), features.mean((2, 3)))
    net.reset_classifier(4)
    assert net(image).shape == (1, 4) and net.get_classifier() is net.classifier


def test_copies():
    net = tiny().eval()
    image = torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(image), net(image))


def test_names_in_state_dicts_never_change():
    with torch.device("meta"):
        names = list(revbifpn_s0().state_dict())
    assert names[0] == "body.0.levels.0.f.depthwise.conv.weight"
    assert names[-1] == "classifier.bias"
    assert (len(names), zlib.crc32("\n".join(names).encode())) == (1874, 850865662)


def test_an_empty_batch_in_evaluation():
    with torch.no_grad():
        assert tiny().eval()(torch.randn(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, pytest.param(torch.contiguous_format, marks=slow)]
)
def test_autocast_is_as_accurate_as_with_stored_activations(memory_format):
    net = tiny().to(memory_format=memory_format)
    twin, exact = copy.deepcopy(net), copy.deepcopy(net)
    twin.reversible = False
    image = torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format)
    expected = step(exact, image)
    with torch.autocast("cpu", torch.bfloat16):
        results, stored = step(net, image), step(twin, image)
        assert all(x.dtype == torch.float32 for x in net.streams(image))
    assert gradient_error(results, expected) <= 2 * gradient_error(stored, expected) < 1


@slow
def test_compiled_evaluation():
    net = tiny(**TWO_LEVELS).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), net(image))


@slow
def test_compiled_training_steps_around_the_engine():
    net = tiny(**TWO_LEVELS)
    twin = copy.deepcopy(net)
    image = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(image).square().mean().backward()
    twin(image).square().mean().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_exact_mode_has_the_bits_of_stored_activations():
    net = tiny(lattice=2.0**-12, drop_path_rate=0.3)
    twin = copy.deepcopy(net)
    twin.reversible = False
    image = torch.randn(2, 3, 64, 64)
    ours, stored = step(net, image), step(twin, image)
    assert all(same_bits(ours[name], stored[name]) for name in stored)
