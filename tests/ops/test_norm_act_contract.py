"""The norm_act family: the same bits again, NaN, empty batches, errors, what PyTorch expects."""

import pytest
import torch
from helpers import same_bits
from norm_act_cases import BACKENDS, CASES, EMULATED, EPS, Case, over_backends

from benchmarks.kernels import NORM_PASSES, plan_norm_launches
from revbifpn_kernels.ops.norm_act.kernels import COUNTS

OPS = torch.ops.revbifpn


def run_all(backend, inputs, act="hardswish"):
    """What every op gives for the inputs, gated."""
    sums = backend.norm_act_sums(inputs.grad, *inputs.norm, act, True)
    gates = inputs.gate, inputs.grad_means
    return {
        "statistics": backend.batch_statistics(inputs.x),
        "y": backend.norm_act(*inputs.norm, inputs.gate, act),
        "means": backend.norm_act_means(*inputs.norm, act),
        "sums": sums,
        "grads": backend.norm_act_grad(inputs.grad, *inputs.norm, *gates, sums, act, True),
    }


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=EMULATED)])
def test_the_same_bits_again(backend):
    backend = BACKENDS[backend]
    inputs = CASES["odd"].inputs(device=backend.device)
    assert same_bits(run_all(backend, inputs), run_all(backend, inputs))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_any_number_of_threads_gives_the_same_bits_cpp(layout):
    inputs = Case((5, 24, 20, 30), layout).inputs()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_all(BACKENDS["cpp"], inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["slice", pytest.param("transposed", marks=EMULATED)])
def test_a_gradient_laid_out_otherwise_gives_the_same_bits_triton(layout):
    backend = BACKENDS["triton"]
    inputs = Case((2, 6, 8, 12), "channels-last", layout).inputs(device=backend.device)
    expected = run_all(backend, inputs)
    inputs.grad = inputs.grad.contiguous(memory_format=torch.channels_last)
    assert same_bits(run_all(backend, inputs), expected)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        *(("cpp", act) for act in ("identity", "relu", "hardswish", "silu")),
        ("triton", "hardswish"),
        *(pytest.param("triton", act, marks=EMULATED) for act in ("relu", "silu")),
    ],
)
def test_nan_spreads_to_what_depends_on_it(name, act):
    backend = BACKENDS[name]
    inputs = CASES["odd"].inputs(device=backend.device)
    inputs.x[1, 2, 3, 4] = torch.nan
    results = run_all(backend, inputs, act)
    channel = torch.zeros(inputs.x.shape[1], dtype=torch.bool, device=inputs.x.device)
    channel[2] = True
    for values in (*results["statistics"], results["grads"][1]):
        assert torch.equal(values.isnan(), channel)
    assert torch.equal(results["y"].isnan(), inputs.x.isnan())
    plane = inputs.x.isnan().any(3).any(2)
    assert torch.equal(results["means"].isnan(), plane)
    assert torch.equal(results["sums"][1].isnan(), plane)
    assert not (results["sums"].isnan() & ~plane).any()
    assert torch.equal(results["grads"][0].isnan().all(3).all(2), channel.expand(plane.shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@over_backends
def test_empty_batch(backend, layout):
    inputs = Case((0, 5, 8, 12), layout).inputs(device=backend.device)
    running = [torch.full((5,), float(k), device=backend.device) for k in range(2)]
    batches = torch.tensor(0, device=backend.device)
    statistics = backend.batch_statistics(inputs.x, (*running, batches))
    assert all(values.shape == (5,) and values.isnan().all() for values in statistics)
    # As PyTorch's: nothing was seen, but a batch was.
    assert running[0].eq(0).all() and running[1].eq(1).all() and batches.item() == 1
    results = run_all(backend, inputs)
    assert results["y"].shape == inputs.x.shape and results["means"].shape == (0, 5)
    assert results["sums"].shape == (5, 0, 5)
    dx, dweight, dbias = results["grads"]
    assert dx.shape == inputs.x.shape
    assert dweight.eq(0).all() and dbias.eq(0).all()


def specialised(shape, layout):
    """All of the planned launches that Triton compiles anew for, beside dtypes and alignment."""
    for op in NORM_PASSES:
        for launch, _ in plan_norm_launches(op, shape, "bf16", layout):
            strides = {name: value for name, value in launch.args.items() if name not in COUNTS}
            yield launch.kernel.__name__, launch.constants, strides


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(48, 56, 56), (320, 7, 7), (3, 5, 9)], ids=str)
def test_another_batch_is_no_new_kernel(shape, layout):
    expected = list(specialised((64, *shape), layout))
    assert len(expected) == 7
    for batch in (1, 2, 63, 1024):
        assert list(specialised((batch, *shape), layout)) == expected


def meta_arguments(op):
    """Arguments that `op` accepts, by name, on tensors without memory: only checks run."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = {
        "x": empty(2, 3, 4, 5),
        **{name: empty(3) for name in ("mean", "invstd", "weight", "bias")},
    }
    grad = {"grad": empty(2, 3, 4, 5)}
    sums = {"sums": empty(5, 2, 3)}
    return {
        "norm_act": {**norm, "gate": empty(2, 3), "act": "silu"},
        "norm_act_means": {**norm, "act": "silu"},
        "norm_act_sums": {**grad, **norm, "act": "silu", "gated": True},
        "norm_act_grad": {
            **grad,
            **norm,
            "gate": empty(2, 3),
            "grad_means": empty(2, 3),
            **sums,
            "act": "silu",
            "is_batch": True,
        },
    }[op]


NORM_OPS = ("norm_act", "norm_act_means", "norm_act_sums", "norm_act_grad")
GATED_OPS = ("norm_act", "norm_act_grad")
BAD = [
    *(
        (op, "x", (2, 3, 4), r"x must have shape \(N, C, H, W\), got \(2, 3, 4\)")
        for op in NORM_OPS
    ),
    *((op, "x", (2, 3, 0, 5), r"x must have sides of at least 1") for op in NORM_OPS),
    *((op, "mean", (2,), r"mean must have \(\(3,\), .* got \(\(2,\)") for op in NORM_OPS),
    *((op, "invstd", (3, 1), r"invstd must have \(\(3,\),") for op in NORM_OPS),
    *((op, "weight", (4,), r"weight must have \(\(3,\),") for op in NORM_OPS),
    *((op, "bias", (1,), r"bias must have \(\(3,\),") for op in NORM_OPS),
    *((op, "gate", (2, 4), r"gate must have \(\(2, 3\), .* got \(\(2, 4\)") for op in GATED_OPS),
    ("norm_act_grad", "grad_means", (3,), r"grad_means must have \(\(2, 3\),"),
    (
        "norm_act_sums",
        "grad",
        (2, 3, 4, 4),
        r"grad must have x's shape, .* expected \(\(2, 3, 4, 5\),",
    ),
    (
        "norm_act_grad",
        "grad",
        (1, 3, 4, 5),
        r"grad must have x's shape, .* expected \(\(2, 3, 4, 5\),",
    ),
]


@pytest.mark.parametrize(("op", "name", "shape", "message"), BAD)
def test_a_wrong_shape_is_named(op, name, shape, message):
    arguments = meta_arguments(op)
    arguments[name] = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        getattr(OPS, op)(*arguments.values())


@pytest.mark.parametrize("op", NORM_OPS)
def test_a_wrong_dtype_or_act_is_named(op):
    arguments = meta_arguments(op)
    with pytest.raises(ValueError, match=f"{op}: act must be one of .*, got 'gelu'"):
        getattr(OPS, op)(*(arguments | {"act": "gelu"}).values())
    half = torch.empty(3, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=f"{op}: mean must have .*float32.*, got .*bfloat16"):
        getattr(OPS, op)(*(arguments | {"mean": half}).values())
    whole = torch.empty(2, 3, 4, 5, dtype=torch.int64, device="meta")
    with pytest.raises(TypeError, match=f"{op}: x must be float64, .* got torch.int64"):
        getattr(OPS, op)(*(arguments | {"x": whole}).values())


OPCHECKED = ("batch_statistics", *NORM_OPS)


@pytest.mark.parametrize("name", ["slice", pytest.param("channels-last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", OPCHECKED, ids=[f"cpp-{op}" for op in OPCHECKED])
def test_opcheck(op, name):
    inputs = CASES[name].inputs()
    C = inputs.x.shape[1]
    grad, gates = (inputs.grad, *inputs.norm), (inputs.gate, inputs.grad_means)
    sums = torch.randn(5, *inputs.x.shape[:2])
    running = torch.zeros(C), torch.ones(C), torch.tensor(0)
    arguments = {
        "batch_statistics": (inputs.x, EPS, *running, 0.1),
        "norm_act": (*inputs.norm, inputs.gate, "silu"),
        "norm_act_means": (*inputs.norm, "silu"),
        "norm_act_sums": (*grad, "silu", True),
        "norm_act_grad": (*grad, *gates, sums, "silu", True),
    }[op]
    torch.library.opcheck(getattr(OPS, op).default, arguments)
