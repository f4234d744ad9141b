"""The published network's own results: outputs, loss, gradients, running statistics, names."""

import golden
import pytest
import torch

from revbifpn_kernels import SIZES, create_model, to_official

pytestmark = pytest.mark.usefixtures("one_thread")
MOST_FLOAT64, MOST_FLOAT32 = 1e-9, 5e-5  # allowed; measured 1e-13 and 2e-6
FAST = [("s0_cls_64", True), ("s0_backbone_only_64", False)]
SLOW = [(case, True) for case in golden.CASES[1:]]


@pytest.mark.parametrize(
    "case, reversible", FAST + [pytest.param(*c, marks=pytest.mark.slow) for c in SLOW]
)
def test_float64(case, reversible):
    expected = golden.read(case)
    meta = expected["meta"]
    net = golden.model(meta, reversible=reversible)
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    x = golden.image(meta)
    with torch.no_grad():
        assert_outputs(golden.outputs(net.eval(), x), expected, "eval", MOST_FLOAT64)
    ys = golden.outputs(net.train(), x)
    assert_outputs(ys, expected, "train", MOST_FLOAT64)
    loss = golden.loss(ys, meta)
    loss.backward()
    assert loss.item() == pytest.approx(meta["loss"], rel=MOST_FLOAT64)
    assert_gradients(to_official(net), expected["grads"])
    assert_statistics(to_official(net), expected["statistics"])


def assert_outputs(ys, expected, mode, most):
    names = [name for name in expected["outputs"] if name.startswith(mode)]
    assert len(ys) == len(names) > 0
    for y, name in zip(ys, names, strict=True):
        assert golden.error(y, expected["outputs"][name]) <= most, name


def assert_gradients(parameters, expected):
    # Some are zero but for rounding, such as those of shifts before a batch norm.
    negligible = 1e-6 * max(norm for norm, _ in expected.values())
    assert {name for name, p in parameters.items() if p.requires_grad} == expected.keys()
    for name, (norm, probe) in expected.items():
        grad = parameters[name].grad
        allowed = MOST_FLOAT64 * max(norm, negligible)
        assert abs(grad.norm().item() - norm) <= allowed, name
        assert abs(golden.probe(name, grad) - probe) <= allowed, name


def assert_statistics(buffers, expected):
    assert expected
    for name, (total, probe) in expected.items():
        buffer = buffers[name]
        allowed = MOST_FLOAT64 * buffer.norm().item()
        assert abs(buffer.sum().item() - total) <= allowed, name
        assert abs(golden.probe(name, buffer) - probe) <= allowed, name


@pytest.mark.parametrize(
    "case, memory_format",
    [
        ("s0_cls_64", torch.channels_last),
        pytest.param("s0_pyramid_96", torch.contiguous_format, marks=pytest.mark.slow),
    ],
)
def test_float32(case, memory_format):
    expected = golden.read(case)
    net = golden.model(expected["meta"]).float().to(memory_format=memory_format)
    x = golden.image(expected["meta"]).float().contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_outputs(golden.outputs(net.eval(), x), expected, "eval", MOST_FLOAT32)
    assert_outputs(golden.outputs(net.train(), x), expected, "train", MOST_FLOAT32)


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_the_published_checkpoints(name):
    with torch.device("meta"):
        net = create_model(name)
    shapes = {key: list(tensor.shape) for key, tensor in to_official(net).items()}
    assert shapes == golden.official_shapes(name)
