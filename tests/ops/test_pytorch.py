"""How the ops behave inside PyTorch: opcheck, compile, export, vmap, autocast, threads, devices."""

import pytest
import torch
from cases import BACKENDS, CASES, Case, over_backends, random_like
from helpers import gradients, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from revbifpn_kernels import resample_add, resample_add_, resample_adjoint, resample_undo

OPS = torch.ops.revbifpn
QUICK_OPCHECKS = [("mixed-kinds", True), ("channels-last-slice", False)]
SLOW_OPCHECKS = [("one-pixel", True), ("slice", False), ("layouts-differ", True)]
over_opchecked = pytest.mark.parametrize(
    ("name", "requires_grad"),
    [
        *QUICK_OPCHECKS,
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_OPCHECKS),
        pytest.param("empty-batch", True, marks=pytest.mark.slow),
    ],
)


def arguments(name, requires_grad):
    x, sources = CASES[name].tensors("fp32-mixed")
    for maps in (x, *sources):
        maps.requires_grad_(requires_grad)
    return x, sources


@over_opchecked
def test_opcheck_resample_add(name, requires_grad):
    x, sources = arguments(name, requires_grad)
    torch.library.opcheck(OPS.resample_add.default, (x, sources, [], [], 0.5, "bilinear", None))
    torch.library.opcheck(OPS.resample_add.default, (x, sources, [], [], 0.5, "nearest", 0.125))


@over_opchecked
def test_opcheck_resample_add_(name, requires_grad):
    x, sources = arguments(name, requires_grad)
    torch.library.opcheck(
        OPS.resample_add_.default, (x.detach().clone(), sources, [], [], 0.5, "bilinear", None)
    )


@over_opchecked
def test_opcheck_resample_adjoint(name, requires_grad):
    grad, sources = arguments(name, requires_grad)
    sizes = [side for source in sources for side in source.shape[2:]]
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(OPS.resample_adjoint.default, (grad, sizes, 0.5, "bilinear", dtype))


@over_opchecked
def test_opcheck_resample_undo(name, requires_grad):
    y, sources = arguments(name, False)
    arguments_ = (y, random_like(y), sources, [], [], 0.5, "bilinear", None)
    torch.library.opcheck(OPS.resample_undo.default, arguments_)


def every_op(x, sources):
    """All four ops in one graph."""
    y = resample_add(x, sources, alpha=0.7, lattice=2.0**-10)
    z = resample_add_(y * 2.0, sources, mode="nearest")
    grads = resample_adjoint(z, [tuple(source.shape[2:]) for source in sources])
    restored, undone = resample_undo(y, z, sources, alpha=0.7, lattice=2.0**-10)
    return y, z, restored, *grads, *undone


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("aot_eager", True),
        pytest.param("aot_eager", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(every_op, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape, sizes in [((2, 3, 8, 12), [(4, 6), (8, 12)]), ((3, 5, 16, 20), [(8, 5), (16, 20)])]:
        x, sources = Case(shape, sizes).tensors("fp32-mixed")
        assert same_bits(compiled(x, sources), every_op(x, sources))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_gradients(dynamic):
    def function(x, sources):
        return resample_add_(resample_add(x, sources) * 2.0, sources, alpha=-0.5)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    inputs = x, sources, random_like(x)
    assert same_bits(gradients(compiled, *inputs), gradients(function, *inputs))


def test_compiled_in_place_writes_to_the_argument():
    torch._dynamo.reset()
    compiled = torch.compile(resample_add_, fullgraph=True, backend="aot_eager")
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    expected = resample_add(x, sources)
    compiled(x, sources)
    assert same_bits(x, expected)


class EveryOp(torch.nn.Module):
    def forward(self, x, sources):
        return every_op(x, sources)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(strict):
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    batch = {0: torch.export.Dim("batch")}
    shapes = {"x": batch, "sources": [batch] * len(sources)}
    program = torch.export.export(EveryOp(), (x, sources), dynamic_shapes=shapes, strict=strict)
    more_x, more_sources = torch.cat([x, x]), [torch.cat([source] * 2) for source in sources]
    assert same_bits(program.module()(more_x, more_sources), every_op(more_x, more_sources))


def test_vmap_raises_a_clear_error():
    x, sources = CASES["even"].tensors()
    with pytest.raises(RuntimeError, match="[Bb]atching rule.*resample_add"):
        torch.vmap(lambda x, source: resample_add(x, [source]))(x[None], sources[0][None])
    with pytest.raises(RuntimeError, match="[Bb]atching rule.*resample_adjoint"):
        torch.vmap(lambda grad: resample_adjoint(grad, [(4, 6)]))(x[None])
    with pytest.raises(RuntimeError, match="[Bb]atching rule.*resample_undo"):
        torch.vmap(lambda y: resample_undo(y, y, sources))(x[None])


def test_autocast_changes_nothing():
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        y = resample_add(x, sources)
    assert same_bits(y, resample_add(x, sources))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients(mode):
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    expected = every_op(x, sources)
    with mode():
        assert same_bits(every_op(x, sources), expected)


def test_meta_tensors_have_the_outputs_of_real_ones():
    x, sources = CASES["channels-last"].tensors("fp32-mixed")
    real = every_op(x, sources)
    meta = every_op(x.to("meta"), [source.to("meta") for source in sources])
    for left, right in zip(meta, real, strict=True):
        assert left.is_meta and left.dtype == right.dtype
        assert (left.shape, left.stride()) == (right.shape, right.stride())


def test_float64_on_a_gpu_is_refused():
    with FakeTensorMode():
        x, source = (torch.empty(1, 1, 4, 4, dtype=torch.float64, device="cuda") for _ in "xs")
        for call in (resample_add, resample_add_, lambda x, s: resample_undo(x, x, s)):
            with pytest.raises(TypeError, match="float64 is supported on CPU only"):
                call(x, [source])
        with pytest.raises(TypeError, match="float64 is supported on CPU only"):
            resample_adjoint(x, [(2, 2)])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@over_backends
def test_same_bits_in_every_run_and_on_every_thread_count(backend, layout):
    if backend.device == "cpu" and backend is BACKENDS["triton"]:
        pytest.skip("emulated launches run one after the other; tests/ptx turns their order round")
    case = Case((2, 8, 64, 64), ((64, 64), (32, 32), (8, 8), (24, 40), (128, 64)), layout, layout)
    x, sources = case.tensors("fp32-mixed", backend.device)
    grad = random_like(x)

    def run():
        y = backend.add(x, sources, 0.7, "bilinear", None)
        return y, backend.undo(y, grad, sources, 0.7, "bilinear", None)

    expected = run()
    threads = torch.get_num_threads()
    for count in (1, 2, 3, threads):
        torch.set_num_threads(count)
        assert same_bits(run(), expected)
    torch.set_num_threads(threads)
