"""The same bits in every run: no result depends on the order in which a GPU runs the blocks."""

import pytest
import torch
from cases import CASES, random_like
from helpers import needs_emulation, same_bits
from norm_act_cases import CASES as NORM_CASES
from norm_act_cases import EPS

from benchmarks.lib.ptx import emulated_gpu
from benchmarks.lib.workloads import LAYOUTS
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad_cuda
from revbifpn_kernels.ops.norm_act.statistics import batch_statistics_cuda
from revbifpn_kernels.ops.norm_act.sums import norm_act_sums_cuda
from revbifpn_kernels.ops.resample.add import _resample_add_cuda
from revbifpn_kernels.ops.resample.adjoint import _resample_adjoint_cuda
from revbifpn_kernels.ops.resample.undo import _resample_undo_cuda
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad_cuda
from revbifpn_kernels.ops.squeeze_excite.norm_act_gates import norm_act_gates_cuda

pytestmark = needs_emulation


def resampled(layout):
    case = CASES["channels-last" if layout == "channels_last" else "revbifpn"]
    x, sources = case.tensors("fp32-bf16")
    sizes = [side for size in case.sizes for side in size]
    grad, options = random_like(x), ([], [], 0.7, "bilinear", None)
    return [
        _resample_add_cuda(x, sources, *options),
        _resample_adjoint_cuda(grad, sizes, 0.7, "bilinear", torch.bfloat16),
        _resample_undo_cuda(x, grad, sources, *options),
    ]


def normed(layout):
    inputs = NORM_CASES["channels-last" if layout == "channels_last" else "revbifpn"].inputs()
    given = inputs.grad, *inputs.norm
    sums = norm_act_sums_cuda(*given, "silu", True)
    return [
        batch_statistics_cuda(inputs.x, EPS, None, None, None, 0.1),
        sums,
        norm_act_grad_cuda(*given, inputs.gate, inputs.grad_means, sums, "silu", True),
        norm_act_grad_cuda(*given, inputs.gate, None, None, "silu", True),
    ]


def gated(layout):
    """With several programs per plane."""
    shape, memory_format = NORM_CASES["programs-share-planes"].shape, LAYOUTS[layout]
    x, grad = (torch.randn(shape).to(memory_format=memory_format) for _ in range(2))
    C, hidden = shape[1], 6
    shapes = (hidden, C, 1, 1), (hidden,), (C, hidden, 1, 1), (C,)
    norm, network = torch.rand(4, C) + 0.5, [torch.randn(shape) for shape in shapes]
    acts = "hardswish", "silu"
    gates, means = norm_act_gates_cuda(x, *norm, *network, *acts)
    given = grad, x, *norm, gates, means, *network, *acts, True
    return [gates, means, *norm_act_excite_grad_cuda(*given)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("run", [resampled, normed, gated])
def test_the_last_block_first(run, layout):
    results = []
    for blocks in (None, lambda count: range(count)[::-1]):
        torch.manual_seed(0)
        with emulated_gpu(blocks=blocks):
            results.append(run(layout))
    assert same_bits(*results)
