"""resample_add_ as a write: what autograd learns of it, and which tensors it refuses."""

import pytest
import torch
from cases import CASES, random_like, random_maps
from helpers import gradients, same_bits

from revbifpn_kernels import resample_add, resample_add_, resample_adjoint

X = (2, 3, 8, 12)


def test_gradients_are_those_out_of_place():
    x, sources = CASES["mixed-kinds"].tensors("fp32-mixed")
    grad_y = random_like(x)

    def in_place(x, sources):
        return resample_add_(x * 1.0, sources, alpha=-0.7)

    assert same_bits(
        gradients(in_place, x, sources, grad_y),
        gradients(resample_add, x, sources, grad_y, alpha=-0.7),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_channel_slices(layout):
    """The halves of a residual block: x is a view, and the loss is taken on its base."""
    source = random_maps((2, 2, 4, 6))
    whole = random_maps((2, 4, 8, 12), layout=layout)

    def in_place(whole, sources):
        whole = whole * 1.0
        resample_add_(whole[:, :2], sources)
        return whole

    def out_of_place(whole, sources):
        return torch.cat([resample_add(whole[:, :2], sources), whole[:, 2:]], dim=1)

    grad_y = random_like(whole)
    assert same_bits(in_place(whole, [source]), out_of_place(whole, [source]))
    assert same_bits(
        gradients(in_place, whole, [source], grad_y),
        gradients(out_of_place, whole, [source], grad_y),
    )


def test_makes_x_require_grad():
    x, sources = CASES["even"].tensors()
    sources[0].requires_grad_()
    assert resample_add_(x, sources) is x
    assert x.requires_grad and not x.is_leaf
    x.sum().backward()
    assert same_bits(sources[0].grad, *resample_adjoint(torch.ones_like(x), [(4, 6)]))


@pytest.mark.parametrize("tracked", [True, False])
def test_bumps_the_version(tracked):
    x, sources = CASES["even"].tensors()
    with torch.set_grad_enabled(tracked):
        before = x._version
        resample_add_(x, sources)
    assert x._version > before


def test_a_write_to_a_saved_tensor_is_noticed():
    x, sources = CASES["even"].tensors()
    saved = x.requires_grad_().exp()
    y = saved * 1.0
    resample_add_(saved, sources)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_refuses_a_leaf_that_requires_grad():
    x = torch.ones(X).requires_grad_()
    with pytest.raises(RuntimeError, match="^resample_add_: x must not be a leaf that requires"):
        resample_add_(x, [torch.ones(2, 3, 4, 6)])
    assert torch.equal(x, torch.ones(X))


@pytest.mark.parametrize("strides", [(36, 12, 0, 1), (288, 96, 6, 1)])
def test_refuses_elements_that_share_memory(strides):
    x = torch.ones(2 * 3 * 8 * 12).as_strided(X, strides)
    with pytest.raises(ValueError, match="^resample_add_: x must not share memory between its"):
        resample_add_(x, [torch.ones(2, 3, 4, 6)])
    assert torch.equal(x, torch.ones(X))


@pytest.mark.parametrize("part", [(slice(1, 4), slice(0, 8)), (slice(0, 3), slice(0, 4))])
def test_refuses_a_source_that_overlaps_x(part):
    """Such a source would change while it is read."""
    whole = torch.randn(2, 4, 8, 12)
    x, before = whole[:, :3], whole.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"^resample_add_: sources\[0\] .*memory"):
        resample_add_(x, [whole[:, part[0], part[1]]])
    assert torch.equal(whole, before)


def test_one_shared_element_is_refused_and_none_accepted():
    whole = torch.randn(720)
    x, beside, over = (whole[i:j] for i, j in ((0, 576), (576, 720), (575, 719)))
    resample_add_(x.view(X), [beside.view(2, 3, 4, 6)])
    with pytest.raises(ValueError, match=r"^resample_add_: sources\[0\] must not share memory"):
        resample_add_(x.view(X), [over.view(2, 3, 4, 6)])


def test_accepts_x_itself_as_a_source():
    x = torch.randn(2, 3, 8, 12)
    doubled = 2 * x
    assert torch.equal(resample_add_(x, [x]), doubled)


@pytest.mark.parametrize("view", ["leaf", "chunk"])
def test_refuses_before_it_writes(view):
    """PyTorch notices such views only when it records the write, after it happened."""
    leaf = torch.ones(2, 6, 8, 12).requires_grad_()
    x = leaf[:, :3] if view == "leaf" else (leaf * 1.0).chunk(2, 1)[0]
    with pytest.raises(RuntimeError, match="^resample_add_: x must"):
        resample_add_(x, [torch.ones(2, 3, 4, 6)])
    assert torch.equal(x, torch.ones(X))


def test_inference_mode_bumps_the_version():
    x, sources = CASES["even"].tensors()
    saved = x.requires_grad_().exp()
    y = saved.square()
    with torch.inference_mode():
        resample_add_(saved, sources)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_accepts_the_other_half_of_the_channels(layout):
    whole = random_maps((2, 6, 8, 12), layout=layout)
    expected = whole[:, :3] + whole[:, 3:]
    resample_add_(whole[:, :3], [whole[:, 3:]])
    assert torch.equal(whole[:, :3], expected)
