"""Each op that goes around the dispatcher does what the dispatcher's does."""

import pytest
import torch
from helpers import needs_emulation, same_bits
from launchers import calls_of_triton, recorded_launches
from operators import Operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from revbifpn_kernels import resample_add, resample_adjoint, resample_undo
from revbifpn_kernels.ops import direct as direct_calls
from revbifpn_kernels.ops.norm_act.factors import norm_factors
from revbifpn_kernels.ops.norm_act.forward import norm_act
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad, norm_act_input_grad
from revbifpn_kernels.ops.norm_act.statistics import batch_norm_factors, batch_statistics
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums
from revbifpn_kernels.ops.squeeze_excite.gates import (
    squeeze_excite_gates,
    squeeze_excite_gates_backward,
)
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad
from revbifpn_kernels.ops.squeeze_excite.norm_act_gates import norm_act_gates

SIDES = [(4, 4), (2, 2)]


def maps(side=8, channels=3):
    return torch.randn(2, channels, side, side)


def fused(channels=3):
    return maps(8, channels), [maps(4, channels), maps(2, channels)]


def sliced(channels):
    return maps(8, 2 * channels)[:, :channels], [maps(4, channels)]


def undone(channels):
    x, sources = fused(channels)
    return x, torch.randn_like(x), sources


def undone_in_two(channels):
    """Sizes that have no kernel for both results."""
    sizes = (7, 9), (7, 9), (4, 5), (3, 3)
    y, grad, *sources = (torch.randn(2, channels, *size) for size in sizes)
    return y, grad, sources


def scaled(channels):
    factors = [[torch.randn(1, channels).expand(2, channels) for _ in SIDES] for _ in range(2)]
    return *fused(channels), *factors


def normed(channels):
    factors = (torch.rand(channels) for _ in range(4))
    return maps(8, channels), *factors, torch.rand(2, channels)


def norm(channels):
    return normed(channels)[:5]


def network(channels, hidden=2):
    weights = torch.randn(hidden, channels, 1, 1), torch.randn(channels, hidden, 1, 1)
    return weights[0], torch.randn(hidden), weights[1], torch.randn(channels)


def planes(channels):
    return torch.rand(2, channels)


def buffers(channels):
    return torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64)


# A function of tensors alone, and some for a number of channels.
CALLS = {
    "resample_add": (lambda x, sources: resample_add(x, sources, alpha=0.5), fused),
    "resample_add of a slice": (resample_add, sliced),
    "resample_add of expanded scales": (
        lambda *given: resample_add(*given[:2], scales=given[2], shifts=given[3]), scaled,
    ),
    "resample_undo": (resample_undo, undone),
    "resample_undo in two launches": (resample_undo, undone_in_two),
    "resample_adjoint": (
        lambda grad: resample_adjoint(grad, SIDES),
        lambda channels: (maps(8, channels),),
    ),
    "norm_act": (lambda *given: norm_act(*given, "silu"), normed),
    "norm_act of a slice": (
        lambda x, *given: norm_act(x, *given, "silu"),
        lambda channels: (maps(8, 2 * channels)[:, :channels], *normed(channels)[1:]),
    ),
    "norm_factors": (
        lambda *given: norm_factors(*given, None, 2),
        lambda channels: normed(channels)[1:5],
    ),
    "batch_statistics": (
        lambda x, mean, var, batches: batch_statistics(x, 1e-3, mean, var, batches, 0.1),
        lambda channels: (maps(8, channels), *buffers(channels)),
    ),
    "batch_norm_factors": (
        lambda x, *given: batch_norm_factors(x, *given[:2], 1e-3, *given[2:], 0.1),
        lambda channels: (maps(8, channels), *norm(channels)[1:3], *buffers(channels)),
    ),
    "norm_act_gates": (
        lambda *given: norm_act_gates(*given, "silu", "relu"),
        lambda channels: (*norm(channels), *network(channels)),
    ),
    "norm_act_sums": (
        lambda *given: norm_act_sums(*given, "silu", True),
        lambda channels: (maps(8, channels), *norm(channels)),
    ),
    "norm_act_grad": (
        lambda *given: norm_act_grad(*given, None, None, "silu", True),
        lambda channels: (maps(8, channels), *normed(channels)),
    ),
    "norm_act_input_grad": (
        lambda *given: norm_act_input_grad(*given[:6], None, *given[6:], "silu"),
        lambda channels: (maps(8, channels), *norm(channels), planes(channels),
                          *norm(channels)[1:3]),
    ),
    "squeeze_excite_gates": (
        lambda *given: squeeze_excite_gates(*given, "silu"),
        lambda channels: (planes(channels), *network(channels)),
    ),
    "squeeze_excite_gates_backward": (
        lambda *given: squeeze_excite_gates_backward(*given, "silu"),
        lambda channels: (planes(channels), planes(channels), *network(channels)),
    ),
    "norm_act_excite_grad": (
        lambda *given: norm_act_excite_grad(*given, "silu", "relu", True),
        lambda channels: (maps(8, channels), *normed(channels), planes(channels),
                          *network(channels)),
    ),
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """Lists the ops that run without the dispatcher."""
    names, runner_of = [], direct_calls._runner

    def listed(op, *given):
        run = runner_of(op, *given)
        return lambda tensors: [names.append(op), run(tensors)][1]

    monkeypatch.setattr(direct_calls, "_runner", listed)
    monkeypatch.setattr(direct_calls, "known", {})
    return names


@pytest.mark.parametrize("op", CALLS)
def test_calls_like_an_earlier_one_are_direct_and_give_its_bits(op, runs):
    function, inputs = CALLS[op]
    given = inputs(channels=4)
    with Operators() as operators:  # which is why this one is not direct
        wanted = function(*given)
    assert any(name == op.split()[0] for name, *_ in operators.calls)
    for _ in range(3):
        assert same_bits(function(*given), wanted)
    assert runs == [op.split()[0]] * 2


class OnGpu(TorchDispatchMode):
    """Ops of ours run their GPU's kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        on_gpu = function.namespace == "revbifpn"
        keys = (torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),) if on_gpu else ()
        call = function.redispatch if on_gpu else function
        return call(*keys, *args, **(kwargs or {}))


@needs_emulation
@pytest.mark.parametrize("op", CALLS)
def test_on_a_gpu_they_launch_what_the_op_launches(op, runs, monkeypatch):
    function, inputs = CALLS[op]
    given = inputs(channels=7)

    def named_call():
        """What launchers were given, with names for addresses of what the op allocated."""
        known = {tensor.data_ptr(): tensor.data_ptr() for tensor in tree_leaves(given)}
        launches.clear()
        results = tree_leaves(function(*given))
        names = {result.data_ptr(): f"result {k}" for k, result in enumerate(results)}

        def named(value):
            is_address = isinstance(value, int) and value > 2**32 and value not in known
            return names.setdefault(value, f"scratch {len(names)}") if is_address else value

        return [(kernel, *tree_map(named, values)) for kernel, *values in launches]

    with recorded_launches() as launches:
        with OnGpu():
            by_op = named_call()
            with calls_of_triton() as by_triton:
                assert named_call() == by_op and not by_triton
        monkeypatch.setattr(direct_calls, "is_on_cpu", lambda device: False)
        function(*given)
        # The first direct call looks the kernels up, the second knows them.
        assert [named_call(), named_call()] == [by_op] * 2
    assert len(runs) == 2 and len(by_op) > 0


def test_running_statistics_change_as_by_the_op(runs):
    x = maps()
    of_op, direct = buffers(3), buffers(3)
    for step in range(4):
        with Operators():
            batch_statistics(x, 1e-3, *of_op, 0.1)
        batch_statistics(x, 1e-3, *direct, 0.1)
        assert same_bits(direct, of_op)
        assert [b._version for b in direct] == [b._version for b in of_op] == [2 * step + 1] * 3
        for values in (*of_op, *direct):
            values.add_(1)  # what a user changes is seen
    assert len(runs) == 3


@pytest.mark.parametrize("calls", [1, 2])  # by the dispatcher, and directly
def test_autograd_notices_that_running_statistics_changed(runs, calls):
    mean, *rest = buffers(3)
    for _ in range(calls - 1):
        batch_statistics(maps(), 1e-3, mean, *rest, 0.1)
    squares = (torch.ones(3, requires_grad=True) * mean).sum()
    batch_statistics(maps(), 1e-3, mean, *rest, 0.1)
    assert len(runs) == calls - 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_what_is_none_is_told_apart(runs):
    given, gate, means = (maps(), *norm(3)), planes(3), planes(3)
    sums = norm_act_sums(*given, "silu", True)
    choices = [(gate, None, None), (None, means, None), (None, None, None), (gate, means, sums)]
    wanted = [norm_act_grad(*given, *choice, "silu", True) for choice in choices]
    runs.clear()
    for choice, results in zip(choices, wanted, strict=True):
        assert same_bits(norm_act_grad(*given, *choice, "silu", True), results)
    assert runs == ["norm_act_grad"] * 4


def test_an_op_of_none_and_options_refuses_what_it_always_refused(runs):
    x, *factors = norm(3)
    for _ in range(2):
        norm_act(x, *factors, None, "silu")
    for wrong in ((x, *factors, None, "tanh"), (3, *factors, None, "silu"), (x,), (),
                  (x, *factors, x[0], "silu"), (x, *factors, "silu", None),
                  (x, *factors, None, "silu", 1),
                  (x, factors[0][:2], *factors[1:], None, "silu")):  # fmt: skip
        for _ in range(2):
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                norm_act(*wrong)
    assert len(runs) == 1
