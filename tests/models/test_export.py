"""The network in evaluation, exported: as a graph of PyTorch's, and as ONNX for other runtimes."""

import pytest
import torch
from tiny import TWO_LEVELS, tiny
from torch.export import Dim

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("num_classes", [10, 0])
@pytest.mark.parametrize("no_grad", [True, False])
def test_export(num_classes, no_grad):
    net = tiny(num_classes=num_classes, **TWO_LEVELS).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(image)
    with torch.set_grad_enabled(not no_grad):
        exported = torch.export.export(net, (image,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(image), expected)


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


@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_tracing(no_grad):
    net = tiny(**TWO_LEVELS).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(not no_grad):  # PyTorch's own check compares with and without
        traced = torch.jit.trace(net, (image,), check_trace=no_grad)
    with torch.no_grad():
        torch.testing.assert_close(traced(image), net(image))  # fused norms round otherwise


@pytest.mark.parametrize("options", [{}, {"num_classes": 0, "lattice": 2.0**-12}])
@pytest.mark.filterwarnings("ignore")
def test_onnx(options, tmp_path):
    pytest.importorskip("onnxscript", reason="an extra")
    runtime = pytest.importorskip("onnxruntime", reason="an extra")
    net = tiny(**TWO_LEVELS, **options).eval()
    image = torch.randn(2, 3, 64, 96)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (image,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = net(image)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    assert len(outputs) == len(expected)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4)
