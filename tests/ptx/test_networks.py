"""Every kernel that a training step of RevBiFPN-S0 to S6 launches, run as compiled for sm_90.

Calls of the real sizes, with as few images as launch the same kernels, beside the C++ ops and these
in float64. Of large grids some blocks run.
"""

import functools
import random

import calls
import pytest
import torch
from helpers import IS_INTERPRETED, assert_as_accurate
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from benchmarks.lib.launches import Call, Spec, calls_of_step
from benchmarks.lib.ptx import emulated_gpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or IS_INTERPRETED, reason="needs kernels compiled for no GPU"
)
CALLS = calls.read()
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# Ops whose blocks write results of their own, so that some of them are a test of these.
SEPARATE = ("resample_add", "resample_add_out", "resample_undo", "resample_adjoint", "norm_act")
MOST_BLOCKS = 48


def some_blocks(count: int) -> list[int]:
    """The first, the last and some between."""
    if count <= MOST_BLOCKS:
        return list(range(count))
    middle = random.Random(0).sample(range(1, count - 1), MOST_BLOCKS - 2)
    return [0, *sorted(middle), count - 1]


def random_tensor(spec: Spec) -> Tensor:
    tensor = spec.on("cpu")
    return tensor.copy_(torch.randn(spec.shape)) if spec.dtype.is_floating_point else tensor.zero_()


def outputs(op: str, arguments: tuple, keys=None) -> list[Tensor]:
    """What a call returns, then what it wrote to; its arguments stay."""
    function = getattr(torch.ops.revbifpn, op).default
    arguments = tree_map_only(Tensor, copied, arguments)
    result = function.redispatch(keys, *arguments) if keys else function(*arguments)
    written = [
        given
        for argument, given in zip(function._schema.arguments, arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and given is not None
    ]
    floats = [leaf for leaf in tree_leaves((result, written)) if leaf is not None]
    return [leaf for leaf in floats if leaf.dtype.is_floating_point]


def copied(tensor: Tensor) -> Tensor:
    return Spec.of(tensor).on("cpu").copy_(tensor)


def check(call: Call) -> None:
    arguments = tree_map_only(Spec, random_tensor, call.arguments)
    blocks = some_blocks if call.op in SEPARATE else None
    with emulated_gpu(blocks=blocks):
        ours = outputs(call.op, arguments, CUDA)
    count = []

    def plain_where_no_block_ran(our: Tensor, plain: Tensor) -> Tensor:
        count.append(our.isfinite().sum().item())
        return torch.where(our.isnan(), plain, our)

    if blocks:
        ours = tree_map(plain_where_no_block_ran, ours, outputs(call.op, arguments))
        assert all(count)
    assert_as_accurate(ours, lambda *given: outputs(call.op, given), *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(CALLS)), ids=lambda k: f"{k}-{CALLS[k].op}")
def test_call(k):
    check(CALLS[k])


@functools.cache
def known_kernels() -> frozenset:
    return frozenset().union(*map(calls.kernels, CALLS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [("revbifpn_s0", "nchw"), ("revbifpn_s3", "channels_last")]
)
def test_the_calls_launch_every_kernel(name, layout):
    step = calls_of_step(name, 8, calls.SIZES[name].resolution, torch.bfloat16, layout)
    needed = {str(call): call for call in step}.values()
    missing = [call for call in needed if not calls.kernels(call) <= known_kernels()]
    assert not missing, "run tests/ptx/calls.py"
