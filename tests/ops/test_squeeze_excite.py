"""Squeeze-excite's gates and their gradient: accuracy, bits, NaN, errors, what PyTorch expects."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import EMULATED, HAS_GPU
from helpers import assert_as_accurate, leaves_alone, on_this_machine, same_bits
from squeeze_excite_cases import CASES, inputs, planned_launches
from torch import Tensor

from revbifpn_kernels.ops.norm_act.arguments import ACTIVATIONS
from revbifpn_kernels.ops.squeeze_excite.gates import (
    squeeze_excite_gates_backward_cuda,
    squeeze_excite_gates_backward_reference,
    squeeze_excite_gates_cuda,
    squeeze_excite_gates_reference,
)

OPS = "squeeze_excite_gates", "squeeze_excite_gates_backward"
LAUNCHERS = [
    on_this_machine(launcher)
    for launcher in (squeeze_excite_gates_cuda, squeeze_excite_gates_backward_cuda)
]
QUICK_TRITON = ("odd", "one channel", "many images")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


@dataclass(frozen=True)
class Backend:
    device: str
    functions: dict

    def gates(self, *arguments) -> Tensor:
        return leaves_alone(self.functions[OPS[0]])(*arguments)

    def backward(self, *arguments) -> tuple[Tensor, ...]:
        return leaves_alone(self.functions[OPS[1]])(*arguments)


# C++ through the dispatcher; Triton by its launchers.
BACKENDS = {
    "cpp": Backend("cpu", {name: getattr(torch.ops.revbifpn, name) for name in OPS}),
    "triton": Backend("cuda" if HAS_GPU else "cpu", dict(zip(OPS, LAUNCHERS, strict=True))),
}
over_backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
over_acts = pytest.mark.parametrize("act", ACTIVATIONS)


def grid():
    for name, backend in BACKENDS.items():
        for case in CASES:
            marks = () if name == "cpp" or case in QUICK_TRITON else EMULATED
            for dtype in DTYPES if name == "cpp" else ("fp32",):
                arguments = backend, case, DTYPES[dtype]
                yield pytest.param(*arguments, id=f"{name}-{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("backend", "case", "dtype"), list(grid()))
def test_as_accurate_as_the_references(backend, case, dtype):
    grad, *network = inputs(case, dtype, backend.device)
    gates = backend.gates(*network, "hardswish")
    assert_as_accurate(gates, squeeze_excite_gates_reference, *network, act="hardswish")
    ours = backend.backward(grad, *network, "hardswish")
    reference = squeeze_excite_gates_backward_reference
    assert_as_accurate(ours, reference, grad, *network, act="hardswish")


@over_acts
@over_backends
def test_every_activation(backend, act):
    grad, *network = inputs("even", device=backend.device)
    assert_as_accurate(backend.gates(*network, act), squeeze_excite_gates_reference, *network,
                       act=act)  # fmt: skip
    ours = backend.backward(grad, *network, act)
    assert_as_accurate(ours, squeeze_excite_gates_backward_reference, grad, *network, act=act)


@over_backends
def test_gates_and_slopes_at_the_kinks_are_pytorchs(backend):
    """Exactly: logits are the bias, and the means of the last unit pass through."""
    logits = torch.tensor([-3.0, 3.0, 0.0, -4.0, 4.0, -2.9990234, 2.9990234, torch.nan])
    logits = logits.to(backend.device)
    zeros = logits.new_zeros
    network = zeros(1, 8), zeros(1, 8, 1, 1), zeros(1), zeros(8, 1, 1, 1), logits, "identity"
    gates = backend.gates(*network)
    torch.testing.assert_close(gates[0], F.hardsigmoid(logits), rtol=2**-22, atol=0, equal_nan=True)
    grad = torch.arange(1.0, 9.0, device=logits.device)[None]
    expected = torch.ops.aten.hardsigmoid_backward(grad[0], logits)
    torch.testing.assert_close(backend.backward(grad, *network)[4], expected, rtol=2**-22, atol=0)


def test_a_gate_tells_its_slope_triton():
    """Between the kinks no gate is rounded to 0 or 1: the fused gradient asks nothing else."""
    backend = BACKENDS["triton"]
    kinks = torch.tensor([-3.0, 3.0])
    logits = torch.cat([kinks, kinks.nextafter(torch.zeros(2)), kinks.nextafter(2 * kinks)])
    logits = logits.to(backend.device)
    zeros = logits.new_zeros
    network = zeros(1, 6), zeros(1, 6, 1, 1), zeros(1), zeros(6, 1, 1, 1), logits, "identity"
    gates = backend.gates(*network)[0]
    assert torch.equal((gates > 0) & (gates < 1), logits.abs() < 3)


@over_backends
def test_any_strides(backend):
    """Slices, transposes, and the channels_last of 1×1 weights, which is dense all the same."""
    arguments = inputs("odd", device=backend.device)
    last = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in arguments]
    apart = [t.repeat_interleave(2, 0)[::2] for t in arguments]
    turned = [t.mT.contiguous().mT if t.dim() == 2 else t for t in arguments]
    for given in (last, apart, turned):
        expected = backend.backward(*arguments, "silu")
        assert same_bits(backend.backward(*given, "silu"), expected)
        gates = [backend.gates(*network, "silu") for network in (given[1:], arguments[1:])]
        assert same_bits(*gates)
        assert all(grad.is_contiguous() for grad in backend.backward(*given, "silu"))


@over_backends
def test_the_same_bits_again(backend):
    grad, *network = inputs("odd", device=backend.device)
    runs = [(backend.gates(*network, "silu"), backend.backward(grad, *network, "silu"))] * 2
    assert same_bits(*runs)


def test_any_number_of_threads_gives_the_same_bits_cpp():
    arguments = [torch.randn(shape) for shape in ((40, 300), (40, 300), (90, 300, 1, 1), (90,))]
    arguments += [torch.randn(300, 90, 1, 1), torch.randn(300)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(BACKENDS["cpp"].backward(*arguments, "hardswish"))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results)


@over_backends
def test_nan_spreads_to_what_depends_on_it(backend):
    grad, *network = inputs("few channels", device=backend.device)
    network[0][2, 3] = torch.nan
    gates = backend.gates(*network, "hardswish")
    image = torch.arange(6, device=gates.device) == 2
    assert torch.equal(gates.isnan(), image[:, None].expand_as(gates))
    network[0][2, 3], network[3][4, 1] = 0.0, torch.nan
    gates = backend.gates(*network, "hardswish")
    assert gates[:, 4].isnan().all() and not gates[:, [0, 1, 2, 3, 5, 6]].isnan().any()
    grads = backend.backward(grad, *network, "hardswish")
    assert not grads[3].isnan().any(), "NaN logits have a slope of 0, as PyTorch's"


@over_backends
def test_empty_batch(backend):
    grad, *network = inputs("few channels", device=backend.device)
    network[0] = network[0][:0]
    assert backend.gates(*network, "relu").shape == (0, 7)
    grads = backend.backward(grad[:0], *network, "relu")
    assert [g.shape for g in grads] == [t.shape for t in network]
    assert all(g.eq(0).all() for g in grads)


def test_another_batch_is_no_new_kernel():
    def specialised(batch):
        for launch, _ in planned_launches((batch, 480, 40)):
            sizes = {name: value for name, value in launch.args.items() if name != "N"}
            yield launch.kernel.__name__, launch.constants, sizes

    assert len(list(specialised(64))) == 6
    assert all(list(specialised(batch)) == list(specialised(64)) for batch in (1, 2, 1024))


BAD = {
    "means": (torch.empty(2, 3, 1, 1), r"means must have shape \(N, C\), got \(2, 3, 1, 1\)"),
    "means' dtype": (torch.empty(2, 3, dtype=torch.half), "means must be float32 or float64, got"),
    "reduce_weight": (torch.empty(4, 2, 1, 1), r"reduce_weight must have \(\(4, 3, 1, 1\), .*got"),
    "reduce_bias": (torch.empty(2, 2), r"reduce_bias must have \(\(4,\), .* got \(\(2, 2\),"),
    "expand_weight": (torch.empty(3, 4), r"expand_weight must have \(\(3, 4, 1, 1\), .*got"),
    "expand_bias": (torch.empty(3).double(), r"expand_bias must have .*float32.*got .*float64"),
    "act": ("gelu", "act must be one of .*, got 'gelu'"),
    "grad_gates": (torch.empty(2, 4), r"grad_gates must have \(\(2, 3\), .* got \(\(2, 4\),"),
}


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in OPS for name in BAD if op == OPS[1] or name != "grad_gates"],
)
def test_a_bad_argument_is_named(op, name):
    value, message = BAD[name]
    shapes = {"means": (2, 3), "reduce_weight": (4, 3, 1, 1), "reduce_bias": (4,)}
    shapes |= {"expand_weight": (3, 4, 1, 1), "expand_bias": (3,)}
    arguments = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    if op == OPS[1]:
        arguments = {"grad_gates": torch.empty(2, 3, device="meta"), **arguments}
    value = value.to("meta") if isinstance(value, Tensor) else value
    arguments |= {"act": "silu"} | {name.removesuffix("' dtype"): value}
    with pytest.raises((ValueError, TypeError), match=f"{op}: {message}"):
        getattr(torch.ops.revbifpn, op)(*arguments.values())


def test_the_dispatcher_op_reads_no_foreign_memory():
    """Called directly it meets no check of Python's."""
    grad, *network = inputs("few channels")
    network[3] = network[3][:5]
    with pytest.raises(RuntimeError, match="gates: expand_weight must be contiguous"):
        torch.ops.revbifpn.squeeze_excite_gates(*network, "silu")
    with pytest.raises(RuntimeError, match="grad_gates must be contiguous, of 42 elements"):
        BACKENDS["cpp"].backward(grad[:5], *inputs("few channels")[1:], "silu")


@pytest.mark.parametrize("op", OPS, ids=[f"cpp-{op}" for op in OPS])
def test_opcheck(op):
    arguments = inputs("odd")[op == OPS[0] :]
    torch.library.opcheck(getattr(torch.ops.revbifpn, op).default, (*arguments, "hardswish"))
