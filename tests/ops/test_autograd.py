"""Gradients of the public functions: against the reference, of second order, of writes in place."""

from functools import partial

import pytest
import torch
from cases import CASES, DTYPES, HAS_GPU, LAYOUTS, random_like, random_maps, small_inputs
from helpers import assert_as_accurate, gradients, same_bits

from revbifpn_kernels import resample_add, resample_add_, resample_adjoint, resample_undo
from revbifpn_kernels.ops.resample.add import resample_add_reference

# Each case with two dtypes; the public functions are tried on every device that has kernels here.
TRIALS = [
    (device, case, dtypes)
    for device in ("cpu", "cuda")[: 1 + HAS_GPU]
    for k, case in enumerate(CASES)
    for j, dtypes in enumerate(DTYPES)
    if (j - 2 * k) % len(DTYPES) < 2 and (device == "cpu" or dtypes != "fp64")
]


@pytest.mark.parametrize(("device", "case", "dtypes"), TRIALS, ids=None)
def test_gradients(device, case, dtypes):
    x, sources = CASES[case].tensors(dtypes, device)
    grad_y = random_like(x)
    ours = gradients(resample_add, x, sources, grad_y, alpha=0.7)
    assert_as_accurate(
        ours, partial(gradients, resample_add_reference), x, sources, grad_y, alpha=0.7
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_every_gradient_layout(layout):
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    grad_y = random_maps(x.shape, layout=layout)
    ours = gradients(resample_add, x, sources, grad_y)
    assert_as_accurate(ours, partial(gradients, resample_add_reference), x, sources, grad_y)


def test_gradient_of_a_sum():
    """`sum` hands back a gradient whose elements share one place in memory."""
    x, sources = CASES["mixed-kinds"].tensors()
    for source in sources:
        source.requires_grad_()
    resample_add(x, sources).sum().backward()
    ours = [source.grad for source in sources]
    assert same_bits(ours, resample_adjoint(torch.ones_like(x), CASES["mixed-kinds"].sizes))


def test_only_wanted_gradients_are_computed():
    x, sources = CASES["mixed-kinds"].tensors()
    sources[1].requires_grad_()
    grad_y = random_like(x)
    resample_add(x, sources).backward(grad_y)
    assert [source.grad is not None for source in sources] == [False, True, False, False]
    assert same_bits(sources[1].grad, *resample_adjoint(grad_y, [CASES["mixed-kinds"].sizes[1]]))


def test_nothing_is_saved_for_backward():
    saved = []
    x, sources = CASES["mixed-kinds"].tensors()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        y = resample_add(x.requires_grad_(), [source.requires_grad_() for source in sources])
    assert y.requires_grad and saved == []


def test_the_gradient_passes_through_the_lattice():
    x, sources = CASES["mixed-kinds"].tensors()
    grad_y = random_like(x)
    rounded = gradients(resample_add, x, sources, grad_y, lattice=0.5)
    assert same_bits(rounded, gradients(resample_add, x, sources, grad_y))


over_modes_in_depth = pytest.mark.parametrize(
    "mode", ["bilinear", pytest.param("nearest", marks=pytest.mark.slow)]
)


@over_modes_in_depth
def test_resample_add_gradcheck(mode):
    def function(x, *sources):
        return resample_add(x, sources, alpha=0.7, mode=mode)

    assert torch.autograd.gradcheck(function, small_inputs())
    assert torch.autograd.gradgradcheck(function, small_inputs())


@over_modes_in_depth
def test_resample_add_in_place_gradcheck(mode):
    def function(x, *sources):
        return resample_add_(x * 1.0, sources, alpha=0.7, mode=mode)

    assert torch.autograd.gradcheck(function, small_inputs())
    assert torch.autograd.gradgradcheck(function, small_inputs())


@over_modes_in_depth
def test_resample_adjoint_gradcheck(mode):
    grad, *sources = small_inputs()
    sizes = [tuple(source.shape[2:]) for source in sources]

    def function(grad):
        return tuple(resample_adjoint(grad, sizes, alpha=0.7, mode=mode))

    assert torch.autograd.gradcheck(function, [grad])
    assert torch.autograd.gradgradcheck(function, [grad])


@over_modes_in_depth
def test_resample_undo_gradcheck(mode):
    y, *sources = small_inputs()
    grad = torch.randn_like(y, requires_grad=True)

    def function(y, grad, *sources):
        x, grads = resample_undo(y, grad, sources, alpha=0.7, mode=mode)
        return x, *grads

    assert torch.autograd.gradcheck(function, [y, grad, *sources])
    assert torch.autograd.gradgradcheck(function, [y, grad, *sources])


def test_forward_mode_is_refused():
    """Its tangents would be dropped in silence."""
    x, (source,) = CASES["even"].tensors()
    with pytest.raises(NotImplementedError, match="^resample_add: forward-mode"):
        torch.func.jvp(lambda source: resample_add(x, [source]), (source,), (source,))
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="^resample_adjoint: forward-mode"):
            resample_adjoint(grad, [(4, 6)])
