"""RevSilo and RevBlock: the paper's sums, any levels and sizes, and nothing but the fused ops."""

import pytest
import torch
import torch.nn.functional as F
from chains import (
    LATTICE,
    WIDTHS,
    blocks,
    growing,
    mbconv,
    plain,
    silo,
    silos,
    stored,
    streams,
)
from helpers import assert_as_accurate
from operators import Operators
from steps import gradients_of, loss_of, relative_error
from torch import nn

from revbifpn_kernels import MBConv, RevBlock, ReversibleSequential, RevSilo


def silo_reference(net: RevSilo, xs, mode: str) -> list:
    """The two halves of the paper, in plain PyTorch."""

    def resampled(y, size):
        if y.shape[2] > size[0]:
            return F.avg_pool2d(y, (y.shape[2] // size[0], y.shape[3] // size[1]))
        options = {"align_corners": False} if mode == "bilinear" else {}
        return y if y.shape[2:] == size else F.interpolate(y, size=size, mode=mode, **options)

    def total(x, half, target, sources):
        for key, module in half.items():
            i, j = map(int, key.split("_"))
            if j == target:
                y = module(sources[i])
                x = y if x is None else x + resampled(y, x.shape[2:])
        return x

    streams_in = list(xs) + [None] * (net.levels - len(xs))
    ys = [total(x, net.down, level, xs) for level, x in enumerate(streams_in)]
    return [total(y, net.up, level, ys) for level, y in enumerate(ys)]


CASES = {
    "three levels": (lambda: silo(plain), [(6, 8, 8), (8, 4, 4), (10, 2, 2)]),
    "two levels": (lambda: silo(plain, 2), [(6, 8, 8), (8, 4, 4)]),
    "odd sides": (lambda: silo(plain), [(6, 13, 9), (8, 7, 5), (10, 4, 3)]),
    "one pixel": (lambda: silo(plain), [(6, 4, 4), (8, 2, 2), (10, 1, 1)]),
    "grows": (lambda: silo(plain), [(6, 8, 8), (8, 4, 4)]),
    "down only": (lambda: RevSilo({(0, 1): plain(6, 8, 2)}), [(6, 8, 8), (8, 4, 4)]),
    "up only": (lambda: RevSilo({(2, 0): plain(10, 6)}), [(6, 8, 8), (8, 4, 4), (10, 2, 2)]),
    "averaged": (lambda: RevSilo({(0, 1): plain(6, 8)}), [(6, 8, 8), (8, 4, 4)]),
    "enlarged down": (lambda: RevSilo({(0, 1): plain(6, 8, 4)}), [(6, 8, 8), (8, 4, 4)]),
    "one module, two edges": (
        lambda: (lambda m: RevSilo({(0, 1): m, (2, 1): m}))(nn.Conv2d(6, 6, 1)),
        [(6, 8, 8), (6, 8, 8), (6, 8, 8)],
    ),
    "same sides": (
        lambda: RevSilo({(0, 1): plain(6, 6), (1, 0): plain(6, 6)}),
        [(6, 5, 7), (6, 5, 7)],
    ),
}


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_silo_is_the_papers_sum(case, mode):
    make, shapes = case
    net = make()
    net.mode = mode
    xs = [torch.randn(2, *shape) for shape in shapes]

    def reference(*xs):
        return silo_reference(net.to(xs[0].dtype), xs, mode)

    with torch.no_grad():
        assert_as_accurate(list(net(*xs)), reference, *xs)
    net.double()
    xs = [x.double() for x in xs]
    expected = gradients_of(stored(net), xs)
    assert relative_error(gradients_of(net, xs), expected) < 1e-12


def test_five_levels_and_eight_sources():
    """Level 8 receives from eight levels at once."""
    net = RevSilo({(i, 8): nn.Conv2d(3, 3, 1) for i in range(8)} | {(8, 0): nn.Conv2d(3, 3, 1)})
    net.double()
    xs = [torch.randn(1, 3, 2, 2, dtype=torch.float64) for _ in range(9)]
    expected = gradients_of(stored(net), xs)
    assert relative_error(gradients_of(net, xs), expected) < 1e-12


def test_created_level_is_the_sum_alone():
    net = silo(plain, 2, inputs=1).eval()
    (x,) = streams(growing)
    ys = net(x)
    with torch.no_grad():
        expected = net.down["0_1"](x)
    assert torch.equal(ys[1], expected) and ys[1].dtype == x.dtype
    assert len(net.inverse(*ys)) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {y.dtype for y in net(x)} == {torch.float32}


def test_empty_batch():
    net = silos(2, plain)
    xs = [x[:0].requires_grad_() for x in streams(silos)]
    loss_of(net(*xs)).backward()
    assert xs[0].grad.shape == xs[0].shape


class OneOperator(nn.Module):
    """A transform of one operator."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.stride = stride

    def forward(self, x):
        return F.conv2d(x, self.weight, stride=self.stride)


def test_a_silo_is_its_transforms_and_one_op_a_level_and_half():
    net = silo(OneOperator)
    xs = [x.requires_grad_() for x in streams(silos)]
    with Operators() as forward:
        ys = net(*xs)
    grads = [torch.randn_like(y) for y in ys]
    with Operators() as backward:
        torch.autograd.backward(ys, grads)
    fused = {name: n for name, n in forward.counts.items() if name.startswith("resample")}
    assert fused == {"resample_add": 4}
    assert backward.counts["resample_undo"] == 4 and "resample_adjoint" not in backward.counts
    assert forward.counts["convolution"] == backward.counts["convolution"] == 6
    copies = {"cat", "clone", "copy_", "split", "split_with_sizes", "chunk", "narrow", "slice"}
    assert not copies & (forward.counts.keys() | backward.counts.keys())


def test_a_residual_block_copies_no_map():
    net = RevBlock(OneOperator(4, 3), OneOperator(3, 4))
    x = torch.randn(2, 7, 8, 8, requires_grad=True)
    with Operators() as forward:
        (y,) = net(x)
    with Operators() as backward:
        y.backward(torch.randn_like(y))
    assert forward.counts["resample_add_out"] == backward.counts["resample_add_out"] == 2
    # The halves of the gradient that transforms are given are made dense.
    assert backward.counts["copy_"] == 2 and "copy_" not in forward.counts
    assert not {"cat", "clone", "chunk"} & (forward.counts.keys() | backward.counts.keys())


@pytest.mark.parametrize("channels", [2, 7, 8])
def test_halves_of_channels(channels):
    half = channels // 2
    net = RevBlock(plain(channels - half, half), plain(half, channels - half)).double()
    x = torch.randn(2, channels, 5, 3, dtype=torch.float64)
    a, b = x.split([channels - half, half], dim=1)
    b = b + net.f(a)
    expected = torch.cat([a + net.g(b), b], dim=1)
    torch.testing.assert_close(net(x)[0], expected)
    torch.testing.assert_close(net.inverse(expected)[0], x)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("expand_ratio", [1, 2])
@pytest.mark.parametrize("se_ratio", [0.0, 0.25])
def test_mbconv(stride, expand_ratio, se_ratio):
    kernel = 2 * stride - 1 if stride > 1 else 3
    net = MBConv(8, 12, kernel, stride, expand_ratio=expand_ratio, se_ratio=se_ratio)
    assert net(torch.randn(2, 8, 16, 24)).shape == (2, 12, 16 // stride, 24 // stride)
    assert hasattr(net, "expand") == (expand_ratio != 1)
    assert hasattr(net, "squeeze_excite") == (se_ratio > 0)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.bias is not None for m in convolutions) == 2 * (se_ratio > 0)


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    net = mbconv(6, 6)[-1].train()
    y = net(torch.ones(4000, 1, 1, 1))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(net.eval()(y), y)


def test_state_dict_names():
    net = ReversibleSequential(silo(lambda i, o, s=1: nn.Conv2d(i, o, 1), 2), blocks(1, plain)[0])
    assert [name for name in net.state_dict() if name.endswith("weight")] == [
        "0.down.0_1.weight",
        "0.up.1_0.weight",
        "1.f.0.weight",
        "1.f.2.weight",
        "1.g.0.weight",
        "1.g.2.weight",
    ]
    assert list(MBConv(4, 4, expand_ratio=2, se_ratio=0.5).state_dict())[:3] == [
        "expand.conv.weight",
        "expand.norm.weight",
        "expand.norm.bias",
    ]
    assert len(WIDTHS) == 3 and LATTICE == 2.0**-12
