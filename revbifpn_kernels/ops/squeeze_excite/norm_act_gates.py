"""Squeeze-excite's gates of act(z), z a norm of x, and the means that they are computed from.

Equal to `norm_act_means` and `squeeze_excite_gates` one after the other. On GPUs it takes one
launch if squeeze-excite's weights are small (`is_small` in image.py): the last program that reads
an image computes its gates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..direct import direct_op
from ..launch import Launch
from ..library import library
from ..norm_act.arguments import NORM, check_norm, sums_dtype
from ..norm_act.forward import norm_act_means_cuda, plan_norm_act_means, store_means
from ..norm_act.kernels import COUNTS
from ..norm_act.tiles import image_counters, in_planes
from .gates import PARAMETERS, check_network, dense, network_operands, squeeze_excite_gates_cuda
from .image import add_chunks, gates_of_image, image_constants, images_to_finish, is_small


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_gates_kernel(
    gates_ptr, means_ptr, parts_ptr, counters_ptr, x_ptr, x_strides,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    reduce_ptr, reduce_bias_ptr, expand_ptr, expand_bias_ptr, share, hidden,
    N, C, pixels, blocks, chunks, images, chunk,
    ACT: tl.constexpr, SQUEEZE_ACT: tl.constexpr, HIDDEN: tl.constexpr, TERMS: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Gates and means (N, C); where chunks share planes, `parts_ptr` (chunks, N, C) has theirs."""
    store_means(
        means_ptr if parts_ptr is None else parts_ptr, x_ptr, x_strides,
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, share,
        N, C, pixels, blocks, chunks, images, chunk, ACT, UNIT, CHANNELS, PIXELS, CHANNELS_LAST,
    )  # fmt: skip
    C = C * UNIT if CHANNELS_LAST else C
    n_first, n_end = images_to_finish(counters_ptr, blocks, chunks, images, N)
    for n in range(n_first, n_end):
        if parts_ptr is not None:
            add_chunks(means_ptr, parts_ptr, n, N, C, chunks, 1)
        gates_of_image(
            gates_ptr, means_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr, expand_bias_ptr,
            n, C, hidden, SQUEEZE_ACT, HIDDEN, TERMS,
        )  # fmt: skip


def plan_norm_act_gates(
    gates, x, mean, invstd, weight, bias, *network_and_acts
) -> tuple[Launch, dict, Tensor]:
    """The launch that writes gates and means of a small network, its operands, the means (N, C)."""
    *network, act, squeeze_act = network_and_acts
    constants = {"SQUEEZE_ACT": squeeze_act, **image_constants(network[0])}
    launch, operands, parts = plan_norm_act_means(
        x, mean, invstd, weight, bias, act, _norm_act_gates_kernel, **constants
    )
    means = parts[0] if len(parts) == 1 else torch.empty_like(parts[0])
    operands |= {
        "gates_ptr": gates,
        "means_ptr": means,
        "parts_ptr": None if len(parts) == 1 else parts,
        "hidden": len(network[0]),
        "counters_ptr": image_counters(launch, x.device),
        **network_operands(*network),
    }
    return launch, operands, means


def norm_act_gates_cuda(x, mean, invstd, weight, bias, *network_and_acts):
    *network, act, squeeze_act = network_and_acts
    norm = mean, invstd, weight, bias
    if not is_small(network[0]) or x.numel() == 0:
        means = norm_act_means_cuda(x, *norm, act)
        return squeeze_excite_gates_cuda(means, *network, squeeze_act), means
    (x,), network = in_planes(x), dense(*network)
    gates = mean.new_empty(x.shape[:2])
    launch, operands, means = plan_norm_act_gates(gates, x, *norm, *network, act, squeeze_act)
    launch.run(x.device, operands)
    return gates, means


# The CPU's kernel is registered in csrc/squeeze_excite/gates.cpp. Returns gates and means (N, C).
library.define(
    f"norm_act_gates({NORM}, {PARAMETERS}, str act, str squeeze_act) -> (Tensor, Tensor)"
)
library.impl("norm_act_gates", norm_act_gates_cuda, "CUDA")
norm_act_gates = direct_op("norm_act_gates", norm_act_gates_cuda)


@torch.library.register_fake("revbifpn::norm_act_gates", lib=library)
def _norm_act_gates_fake(x, mean, invstd, weight, bias, *network_and_acts):
    *network, act, squeeze_act = network_and_acts
    check_norm("norm_act_gates", x, mean, invstd, weight, bias, act)
    means = x.new_empty(x.shape[:2], dtype=sums_dtype(x))
    check_network("norm_act_gates", means, *network, squeeze_act)
    return torch.empty_like(means), means
