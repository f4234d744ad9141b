"""The network in evaluation as a graph: export, trace, ONNX; torch.fx and script are refused."""

import pytest
import torch
from tiny import TWO_LEVELS, tiny
from torch import nn
from torch.export import Dim

from revbifpn_kernels import RevBiFPN

pytestmark = pytest.mark.usefixtures("one_thread")


slow = pytest.mark.slow


@pytest.mark.parametrize("num_classes, no_grad", [(10, False), pytest.param(0, True, marks=slow)])
def test_export(num_classes, no_grad):
    net = tiny(num_classes=num_classes, **TWO_LEVELS).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(image)
    with torch.set_grad_enabled(not no_grad):
        exported = torch.export.export(net, (image,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(image), expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_bounded", [False, True])
def test_export_with_dynamic_sizes(is_bounded):
    net = tiny(**TWO_LEVELS).eval()
    sides = [Dim(name, min=32, max=512) for name in "hw"] if is_bounded else [Dim.AUTO, Dim.AUTO]
    program = torch.export.export(
        net,
        (torch.randn(2, 3, 64, 96),),
        dynamic_shapes={"image": {0: Dim.AUTO, 2: sides[0], 3: sides[1]}},
        # Whether a level is smaller than the one before, bounds alone do not prove to PyTorch.
        prefer_deferred_runtime_asserts_over_guards=is_bounded,
    )
    exported = program.module()
    for shape in ((1, 3, 128, 64), (3, 3, 96, 224), (2, 3, 97, 131)):
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(exported(image), net(image))


@pytest.mark.parametrize("no_grad", [False, pytest.param(True, marks=slow)])
@pytest.mark.filterwarnings("ignore")
def test_tracing(no_grad):
    net = tiny(**TWO_LEVELS).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(not no_grad):  # PyTorch's own check compares with and without
        traced = torch.jit.trace(net, (image,), check_trace=no_grad)
    with torch.no_grad():
        torch.testing.assert_close(traced(image), net(image))  # fused norms round otherwise


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="an extra")
    runtime = pytest.importorskip("onnxruntime", reason="an extra")
    net = tiny(**TWO_LEVELS, num_classes=0, lattice=2.0**-12).eval()
    image = torch.randn(2, 3, 64, 96)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (image,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = net(image)
    assert len(outputs) == len(expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4)


def parts(net):
    return {"RevBiFPN": net, "ReversibleSequential": net.body, "RevSilo": net.body[2]}


@pytest.mark.parametrize("name", ["RevBiFPN", "ReversibleSequential", "RevSilo"])
@pytest.mark.parametrize("wrap", [lambda part: part, nn.Sequential], ids=["alone", "wrapped"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_torchscript_is_refused_by_name(name, wrap):
    part = parts(tiny(**TWO_LEVELS).eval())[name]
    with pytest.raises(RuntimeError, match=f"{name}: torch.jit.script cannot .* torch.export"):
        torch.jit.script(wrap(part))


@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential], ids=["alone", "wrapped"])
def test_fx_is_refused_by_name(wrap):
    net = wrap(tiny(**TWO_LEVELS).eval())
    with pytest.raises(RuntimeError, match="RevBiFPN: torch.fx cannot .* features_only=True"):
        torch.fx.symbolic_trace(net)


def test_torchvisions_feature_extractor_takes_the_network_as_a_leaf():
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="an extra")
    net = nn.Sequential(tiny(**TWO_LEVELS), nn.Softmax(dim=1)).eval()
    kwargs = {"leaf_modules": [RevBiFPN]}
    extractor = extraction.create_feature_extractor(net, ["0"], tracer_kwargs=kwargs)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(extractor(image)["0"], net[0](image))
