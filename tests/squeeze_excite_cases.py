"""What squeeze-excite's gates are tried on: named shapes, their inputs and launches."""

import torch
from torch import Tensor

from revbifpn_kernels.ops.launch import Launch
from revbifpn_kernels.ops.squeeze_excite.gates import (
    plan_squeeze_excite_gates,
    plan_squeeze_excite_gates_backward,
)
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import plan_norm_act_excite_grad
from revbifpn_kernels.ops.squeeze_excite.norm_act_gates import plan_norm_act_gates

CASES = {  # N, C, hidden
    "even": (4, 96, 16),
    "odd": (3, 35, 9),
    "one image": (1, 64, 20),
    "one hidden unit": (16, 40, 1),
    "few channels": (6, 7, 3),
    "one channel": (9, 1, 5),
    "long rows": (2, 1000, 33),
    "many images": (65, 48, 12),
}


def inputs(case, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """The gates' gradient, the means and the parameters; a third of the gates is 0 or 1."""
    N, C, hidden = CASES[case]
    shapes = (N, C), (N, C), (hidden, C, 1, 1), (hidden,), (C, hidden, 1, 1), (C,)
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    values[2] /= C**0.5
    values[4] *= 2.0 / hidden**0.5
    return [tensor.to(device, dtype) for tensor in values]


def planned_launches(sizes: tuple[int, int, int]) -> list[tuple[Launch, dict]]:
    """Those of both ops, for N, C and hidden, on tensors that own no memory."""
    N, C, hidden = sizes
    shapes = (N, C), (hidden, C, 1, 1), (hidden,), (C, hidden, 1, 1), (C,)
    network = [torch.empty(shape, device="meta") for shape in shapes]
    means, values = network[0], torch.empty((N, hidden), device="meta")
    scratch, act = (values, values, values, means), "hardswish"
    return [
        *plan_squeeze_excite_gates(means, values, *network, act),
        *plan_squeeze_excite_gates_backward(network, scratch, means, *network, act),
    ]


def planned_fused_launches(
    sizes: tuple[int, int, int], side: int = 14
) -> list[tuple[Launch, dict]]:
    """Those of the ops that also reduce maps of side × side pixels, in bfloat16."""
    N, C, hidden = sizes
    x = torch.empty((N, C, side, side), dtype=torch.bfloat16, device="meta")
    gate, channel = (torch.empty(shape, device="meta") for shape in ((N, C), (C,)))
    shapes = (hidden, C, 1, 1), (hidden,), (C, hidden, 1, 1), (C,)
    network = [torch.empty(shape, device="meta") for shape in shapes]
    norm, acts = (channel,) * 4, ("hardswish", "hardswish")
    gradient = x, channel, channel, network, x, x, norm, gate, gate, network, *acts, True
    return [
        plan_norm_act_gates(gate, x, *norm, *network, *acts)[:2],
        *plan_norm_act_excite_grad(*gradient),
    ]
