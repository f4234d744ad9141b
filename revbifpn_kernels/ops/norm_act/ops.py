"""Batch norm, activation and gate in one pass, and their gradient in two.

    xc = x − mean,  z = xc · invstd · weight + bias,  y = act(z) · gate

x, y (N, C, H, W); mean, invstd, weight, bias (C,); gate (N, C), which squeeze-excite computes from
the means of act(z), and stochastic depth draws. For E elements of x: statistics read E, `norm_act`
reads and writes E, `norm_act_means` reads E; the gradient reads 2E for its sums, then 2E to write
E. Nothing but x, the statistics and the gate is needed for it: z and act(z) are made again.

With d = g·gate + m for the result's gradient g and m, a pixel's share of the means' gradient:

    dz = d·act′(z),  dx = invstd·weight·(dz − Σdz/M − xc·invstd²·Σ(dz·xc)/M),  M = N·H·W
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_float64_is_on_cpu, check_maps, check_values
from ..library import library
from .launchers import LAUNCHERS

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "silu": F.silu,
}
GATED_SUMS, PLAIN_SUMS = 5, 2
OF_GATES = 4  # among the gated


def sums_dtype(x: Tensor) -> torch.dtype:
    """What statistics, gates and sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(values: Tensor | None, default: float) -> Tensor | float:
    return default if values is None else values[:, None, None]


def norm_act_reference(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    act: str = "identity",
) -> Tensor:
    """The specification of y in plain PyTorch."""
    xc = x.to(mean.dtype) - mean[:, None, None]
    scaled = xc * invstd[:, None, None] * _per_channel(weight, 1.0)
    y = ACTIVATIONS[act](scaled + _per_channel(bias, 0.0))
    return (y if gate is None else y * gate[:, :, None, None]).to(x.dtype)


def batch_statistics_reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The specification of mean and invstd."""
    x = x.to(sums_dtype(x))
    mean = x.mean((0, 2, 3))  # nearer to the truth than var_mean's
    var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    return mean, (var + eps).rsqrt()


def _act_and_slope(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        y = ACTIVATIONS[act](leaf) * 1
        (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def norm_act_sums_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "identity",
    gated: bool = False,
) -> Tensor:
    """The specification of the sums that the gradient needs."""
    grad, xc = grad.to(mean.dtype), x.to(mean.dtype) - mean[:, None, None]
    z = xc * invstd[:, None, None] * _per_channel(weight, 1.0) + _per_channel(bias, 0.0)
    y, slope = _act_and_slope(z, act)
    terms = [grad * slope, grad * slope * xc]
    if gated:
        terms += [slope, slope * xc, grad * y]
    return torch.stack([term.sum((2, 3)) for term in terms])


def norm_act_grad_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    grad_means: Tensor | None = None,
    act: str = "identity",
    is_batch: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of dx, dweight, dbias, by autograd through the statistics."""
    with torch.enable_grad():
        leaf = x.detach().to(mean.dtype).requires_grad_()
        factor = mean.new_ones(mean.shape) if weight is None else weight.detach()
        factor = factor.clone().requires_grad_()
        shift = (mean.new_zeros(mean.shape) if bias is None else bias.detach()).clone()
        shift.requires_grad_()
        if is_batch:
            # invstd² = 1/(var + eps), so eps need not be known.
            var, center = torch.var_mean(leaf, (0, 2, 3), correction=0)
            eps = invstd**-2 - var.detach()
            spread = (var + eps).rsqrt()
        else:
            center, spread = mean, invstd
        y = norm_act_reference(leaf, center, spread, factor, shift, None, act)
        outputs, grads = [y], [grad.to(mean.dtype)]
        if gate is not None:
            grads[0] = grads[0] * gate[:, :, None, None]
        if grad_means is not None:
            grads[0] = grads[0] + grad_means[:, :, None, None] / y[0, 0].numel()
        dx, dweight, dbias = torch.autograd.grad(outputs, [leaf, factor, shift], grads)
    return dx.to(x.dtype), dweight, dbias


# Mean and invstd of a batch; running statistics move as in torch.nn.functional.batch_norm, and
# `batches` counts up. Key CPU: csrc/norm_act/.
library.define(
    "batch_statistics(Tensor x, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, float momentum) -> (Tensor, Tensor)"
)
NORM = "Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias"
library.define(f"norm_act({NORM}, Tensor? gate, str act) -> Tensor")
# Means of act(z) over the pixels, (N, C).
library.define(f"norm_act_means({NORM}, str act) -> Tensor")
# (2, N, C): Σ g·act′(z), Σ g·act′(z)·xc over the pixels; with `gated` (5, N, C): Σ act′(z),
# Σ act′(z)·xc and Σ g·act(z), the gate's gradient, too.
library.define(f"norm_act_sums(Tensor grad, {NORM}, str act, bool gated) -> Tensor")
# dx, dweight and dbias. Without `is_batch` the statistics are constants. `sums` are those of
# norm_act_sums, which are taken here where there are none: nobody else wants those without a gate.
library.define(
    f"norm_act_grad(Tensor grad, {NORM}, Tensor? gate, Tensor? grad_means, Tensor? sums, str act, "
    "bool is_batch) -> (Tensor, Tensor, Tensor)"
)
for _name, _launcher in LAUNCHERS.items():
    library.impl(_name, _launcher, "CUDA")


def check_norm(op: str, x: Tensor, mean, invstd, weight, bias, act: str = "identity") -> None:
    check_maps(op, "x", x)
    check_float64_is_on_cpu(op, x)
    expected = (x.shape[1],), sums_dtype(x), x.device
    for name, values in (("mean", mean), ("invstd", invstd), ("weight", weight), ("bias", bias)):
        if values is not None:
            check_values(op, name, values, expected)
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {tuple(ACTIVATIONS)}, got {act!r}")


def check_gate(op: str, name: str, gate: Tensor | None, x: Tensor) -> None:
    if gate is not None:
        check_values(op, name, gate, (tuple(x.shape[:2]), sums_dtype(x), x.device))


def check_grad(op: str, grad: Tensor, x: Tensor) -> None:
    expected, got = ((tuple(t.shape), t.dtype, t.device) for t in (x, grad))
    if got != expected:
        raise ValueError(f"{op}: grad must have x's {expected}, got {got}")


@torch.library.register_fake("revbifpn::batch_statistics", lib=library)
def _batch_statistics_fake(x, eps, running_mean, running_var, batches, momentum):
    check_maps("batch_statistics", "x", x)
    return tuple(x.new_empty(x.shape[1], dtype=sums_dtype(x)) for _ in range(2))


@torch.library.register_fake("revbifpn::norm_act", lib=library)
def _norm_act_fake(x, mean, invstd, weight, bias, gate, act):
    check_norm("norm_act", x, mean, invstd, weight, bias, act)
    check_gate("norm_act", "gate", gate, x)
    return torch.empty_like(x)


@torch.library.register_fake("revbifpn::norm_act_means", lib=library)
def _norm_act_means_fake(x, mean, invstd, weight, bias, act):
    check_norm("norm_act_means", x, mean, invstd, weight, bias, act)
    return x.new_empty(x.shape[:2], dtype=sums_dtype(x))


@torch.library.register_fake("revbifpn::norm_act_sums", lib=library)
def _norm_act_sums_fake(grad, x, mean, invstd, weight, bias, act, gated):
    check_norm("norm_act_sums", x, mean, invstd, weight, bias, act)
    check_grad("norm_act_sums", grad, x)
    return x.new_empty((GATED_SUMS if gated else PLAIN_SUMS, *x.shape[:2]), dtype=sums_dtype(x))


@torch.library.register_fake("revbifpn::norm_act_grad", lib=library)
def _norm_act_grad_fake(grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch):
    check_norm("norm_act_grad", x, mean, invstd, weight, bias, act)
    check_grad("norm_act_grad", grad, x)
    check_gate("norm_act_grad", "gate", gate, x)
    check_gate("norm_act_grad", "grad_means", grad_means, x)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
