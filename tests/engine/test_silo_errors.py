"""Edges, options and streams that do not fit: a clear error."""

import pytest
import torch
from chains import LATTICE, conv, plain, silo, silos
from torch import nn

from revbifpn_kernels import MBConv, RevBlock, ReversibleSequential, RevSilo

EDGES = {
    "empty": ({}, TypeError, "edges must be a mapping .* got dict without entries"),
    "list": ([(0, 1)], TypeError, r"edges must be a mapping from \(i, j\) to modules, got list"),
    "itself": ({(1, 1): conv(4, 4)}, ValueError, r"edge \(1, 1\) must join two levels, got one"),
    "triple": ({(0, 1, 2): conv(4, 4)}, ValueError, r"an edge must be \(i, j\).* got \(0, 1, 2\)"),
    "negative": ({(-1, 0): conv(4, 4)}, ValueError, r"got \(-1, 0\)"),
    "text": ({"01": conv(4, 4)}, ValueError, "got '01'"),
    "function": ({(0, 1): torch.relu}, TypeError, r"edge \(0, 1\) must be an nn.Module, got buil"),
    "nine": ({(i, 9): conv(4, 4) for i in range(9)}, ValueError, "at most 8 .* 9 onto level 9"),
}


@pytest.mark.parametrize("edges, error, message", EDGES.values(), ids=EDGES.keys())
def test_edges(edges, error, message):
    with pytest.raises(
        error, match=f"RevSilo: .*{message}" if "RevSilo" not in message else message
    ):
        RevSilo(edges)


def test_options():
    edges = {(0, 1): conv(6, 8)}
    with pytest.raises(ValueError, match="RevSilo: mode must be 'bilinear' or 'nearest', got 'cu"):
        RevSilo(edges, mode="cubic")
    with pytest.raises(ValueError, match="RevSilo: lattice must be a positive power of two"):
        RevSilo(edges, lattice=0.1)
    with pytest.raises(ValueError, match="RevBlock: lattice must be a positive power of two"):
        RevBlock(conv(4, 4), conv(4, 4), lattice=3)
    with pytest.raises(ValueError, match="ReversibleSequential: lattice must be a positive power"):
        ReversibleSequential(RevSilo(edges), lattice=-1.0)
    with pytest.raises(ValueError, match="RevSilo: inputs must be 1 to 2 streams, got 3"):
        RevSilo(edges, inputs=3)
    with pytest.raises(TypeError, match="block 1 must be a Reversible .* got Conv2d"):
        ReversibleSequential(RevSilo(edges), conv(4, 4))


X = [torch.randn(2, c, s, s) for c, s in ((6, 8), (8, 4), (10, 2))]
STREAMS = {
    "none": ([], ValueError, "at least one stream, got none"),
    "one of three": (X[:1], ValueError, r"edge \(1, 2\) must start at a stream, and only 1"),
    "four of three": ([*X, X[0]], ValueError, "expected 3 streams, or fewer .* got 4"),
    "integers": ([X[0], X[1].long(), X[2]], TypeError, "stream 1 must be a floating-point tensor"),
    "no tensor": ([X[0], X[1], None], TypeError, "stream 2 must be .* got NoneType"),
    "3-d": ([X[0][0], X[1], X[2]], ValueError, r"stream 0 must have shape \(N, C, H, W\)"),
    "batch": ([X[0], X[1], X[2][:1]], ValueError, r"edge \(0, 2\) must share \(N, C\) = \(1, 10\)"),
    "too small": (
        [X[0], X[1], X[2][..., :1]],
        ValueError,
        None,
    ),
    "channels": (
        [X[0], X[1], X[2][:, :9]],
        ValueError,
        r"edge \(0, 2\) must share \(N, C\) = \(2,",
    ),
    "larger": ([X[0], X[1][..., :3], X[2]], ValueError, r"edge \(0, 1\) must be no larger than"),
}


@pytest.mark.parametrize("xs, error, message", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("is_reversible", [True, False])
def test_streams(xs, error, message, is_reversible):
    net = silos(1, plain)
    net.reversible = is_reversible
    if message is None:  # 2x2 averaged onto 2x1 is allowed
        assert net(*xs)[2].shape == (2, 10, 2, 1)
        return
    with pytest.raises(error, match=message):
        net(*xs)


def test_lattice_needs_precision():
    net = ReversibleSequential(silo(plain), lattice=LATTICE).bfloat16()
    with pytest.raises(TypeError, match="stream 0 must be float32 or float64 with a lattice, got"):
        net(*[x.bfloat16() for x in X])


def test_grown_silo_with_declared_inputs():
    net = silo(plain, 2, inputs=1)
    with pytest.raises(ValueError, match="RevSilo: expected 1 streams, got 2"):
        net(*X[:2])


def test_levels_that_cannot_be_created():
    net = RevSilo({(0, 1): conv(6, 8), (0, 2): conv(6, 10), (1, 2): conv(8, 10)}, inputs=1)
    with pytest.raises(ValueError, match=r"edge \(1, 2\) must start at a stream, and only 1 were"):
        net(X[0])
    net = RevSilo({(0, 1): conv(6, 8), (2, 0): conv(10, 6)})
    with pytest.raises(ValueError, match="level 2 has neither a stream nor a down edge onto it"):
        net(*X[:2])


def test_chains():
    net = silos(2, plain)
    with pytest.raises(TypeError, match=r"stream 0 must be .* got list; pass streams one by one"):
        net(X)
    with pytest.raises(TypeError, match=r"inverse takes streams one by one"):
        net.inverse(net(*X))
    with pytest.raises(TypeError, match=r"block 0 .* got ReversibleSequential; unpack it: \*chain"):
        ReversibleSequential(net)
    net.lattice = LATTICE
    net.append(silo(plain))
    with pytest.raises(ValueError, match="block 2 has no lattice and others have"):
        net(*X)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"expand_ratio": 0}, "expand_ratio must be positive, got 0"),
        ({"se_ratio": 1.5}, r"se_ratio must be in \[0, 1\], got 1.5"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_mbconv(options, message):
    with pytest.raises(ValueError, match=f"MBConv: {message}"):
        MBConv(4, 4, **options)


def test_residual_block():
    with pytest.raises(ValueError, match="RevBlock: stream 0 must have at least 2 channels"):
        RevBlock(conv(1, 1), conv(1, 1))(torch.randn(1, 1, 4, 4))
    with pytest.raises(
        ValueError, match=r"the result of f must have .* \(2, 3, 4, 4\), got \(2, 4"
    ):
        RevBlock(conv(4, 4), conv(3, 4))(torch.randn(2, 7, 4, 4))
    with pytest.raises(ValueError, match="the result of g must have the shape"):
        RevBlock(conv(4, 4), conv(4, 4, 2))(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("is_reversible", [True, False])
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_transform_that_writes_to_its_input(is_reversible, guard):
    relu = nn.Sequential(nn.ReLU(inplace=True), conv(6, 8, 2))
    net = ReversibleSequential(RevSilo({(0, 1): relu}), reversible=is_reversible)
    with guard(), pytest.raises(RuntimeError, match=r"edge \(0, 1\) changed its input in place"):
        net(X[0].clone(), X[1])
