"""Which calls go around the dispatcher."""

import pytest
import torch
from helpers import same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revbifpn_kernels import resample_add
from revbifpn_kernels.ops import direct as direct_calls
from revbifpn_kernels.ops.direct import DirectCalls
from revbifpn_kernels.ops.norm_act.factors import norm_factors


def maps(side=8, channels=3):
    return torch.randn(2, channels, side, side)


def fused(channels=3):
    return maps(8, channels), [maps(4, channels), maps(2, channels)]


@pytest.fixture
def direct(monkeypatch):
    """Lists what each attempt to call an op directly came to."""
    attempts, call = [], DirectCalls.__call__

    def listed(self, *given):
        result = call(self, *given)
        attempts.append(result is not NotImplemented)
        return result

    monkeypatch.setattr(DirectCalls, "__call__", listed)
    return attempts


def once_direct(direct):
    """A call that is direct."""
    x, sources = fused()
    resample_add(x, sources), resample_add(x, sources)
    assert direct.pop()
    direct.clear()
    return x, sources


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SeesOps(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Other(torch.Tensor):
    """What functions return for it is of its type."""


@pytest.mark.parametrize("is_other", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("first", ["plain", "other"])
def test_subclasses_of_tensor_get_theirs_from_every_call(direct, monkeypatch, is_other, first):
    monkeypatch.setattr(direct_calls, "known", {})
    x, sources = fused()
    if first == "plain":
        resample_add(x, sources)
    x = x.as_subclass(Other) if is_other[0] else x
    sources[-1] = sources[-1].as_subclass(Other) if is_other[1] else sources[-1]
    for _ in range(3):
        assert type(resample_add(x, sources)) is Other
    assert not any(direct)


def test_subclasses_of_tensor_get_theirs_from_ops_of_the_library():
    plain = [torch.rand(3) for _ in range(4)]
    other = [values.as_subclass(Other) for values in plain]
    for given in (plain, other, other, other):
        scale, _ = norm_factors(*given, None, 2)
        assert type(scale) is type(given[0])


@pytest.mark.parametrize(
    "watching",
    [SeesFunctions, SeesOps, FakeTensorMode, torch.profiler.profile,
     torch.autograd.forward_ad.dual_level],
)  # fmt: skip
def test_what_watches_sees_the_op(direct, watching):
    x, sources = once_direct(direct)
    with watching() as mode:
        if watching is FakeTensorMode:
            x, *sources = (mode.from_tensor(t) for t in (x, *sources))
        resample_add(x, sources)
        resample_add(x, sources)
    assert direct == [False, False]


def test_transforms_and_tracers_see_the_op(direct):
    x, sources = once_direct(direct)
    traced = torch.jit.trace(resample_add_one, (x, sources[0]), check_trace=False)
    assert "revbifpn::resample_add" in str(traced.inlined_graph)
    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.vmap(resample_add_one)(x[None], sources[0][None])
    program = torch.export.export(AddsOne(), (x, sources[0]))
    assert "revbifpn.resample_add" in str(program.graph)
    compiled = torch.compile(resample_add_one, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(x, sources[0]), resample_add_one(x, sources[0]))


def resample_add_one(x, source):
    return resample_add(x, [source])


class AddsOne(nn.Module):
    def forward(self, x, source):
        return resample_add(x, [source])


def test_gradients_are_never_lost(direct):
    x, sources = once_direct(direct)
    x.requires_grad_()
    with torch.no_grad():
        assert not resample_add(x, sources).requires_grad
        assert not resample_add(x, sources).requires_grad
    assert direct == [False, True]
    assert resample_add(x, sources).requires_grad
    x.requires_grad_(False)
    sources[1].requires_grad_()
    assert all(resample_add(x, sources).requires_grad for _ in range(2))


def test_what_differs_is_checked_anew(direct):
    x, sources = once_direct(direct)
    with pytest.raises(ValueError, match=r"sources\[1\] must share"):
        resample_add(x, [sources[0], maps(2, channels=2)])
    with pytest.raises(TypeError, match="sources must be a list or tuple"):
        resample_add(x, 3)
    with pytest.raises(TypeError, match="sources must be a list or tuple"):
        resample_add(x, sources[0])
    with pytest.raises(TypeError, match="sources must be a list or tuple"):
        resample_add(x, dict.fromkeys(sources))
    same = torch.stack([sources[0]] * 2)
    resample_add(x, [*same])
    with pytest.raises(TypeError, match="sources must be a list or tuple"):
        resample_add(x, same)
    factors = [torch.ones(2, 3), torch.ones(2, 3)]
    resample_add(x, sources, scales=factors, shifts=[torch.ones(2, 3), torch.ones(2, 3)])
    for scales, shifts in ((torch.ones(2, 2, 3), factors), (factors, torch.ones(2, 2, 3))):
        with pytest.raises(TypeError, match="must be a list or tuple"):
            resample_add(x, sources, scales=scales, shifts=shifts)
    with pytest.raises(ValueError, match="shifts must hold one entry for each"):
        resample_add(x, sources, scales=factors, shifts=[torch.ones(2, 3)])
    with pytest.raises(ValueError, match="given together"):
        resample_add(x, sources, shifts=[torch.ones(2, 3)] * 2)
    with pytest.raises(ValueError, match="mode must be"):
        resample_add(x, sources, mode=["bilinear"])
    with pytest.raises(TypeError, match="must be float32"):
        resample_add(x, [sources[0], sources[1].double()])
    other = x.to(memory_format=torch.channels_last)
    assert resample_add(other, sources).is_contiguous(memory_format=torch.channels_last)
    negative = torch.complex(x, x).conj().imag  # its sign is a bit that only the dispatcher reads
    results = [resample_add(negative, sources) for _ in range(2)]
    assert not any(direct)
    assert all(same_bits(result, resample_add(-x, sources)) for result in results)


def test_slices_and_their_copies_are_told_apart(direct):
    x, sources = maps(channels=10)[:, :5], [maps(4, channels=5)]
    results = [resample_add(given, sources) for given in (x, x.contiguous()) for _ in range(2)]
    assert direct == [False, True] * 2
    assert all(same_bits(result, results[0]) for result in results)


def test_few_options_are_remembered(direct, monkeypatch):
    monkeypatch.setattr(direct_calls, "MOST", 3)
    monkeypatch.setattr(direct_calls, "known", {})
    x, sources = fused()
    for alpha in (1.0, 2.0, 3.0, 4.0, 1.0, 4.0):
        resample_add(x, sources, alpha=alpha)
    assert direct == [False] * 5 + [True]


def test_few_geometries_are_remembered_the_latest_first(direct, monkeypatch):
    monkeypatch.setattr(direct_calls, "MOST_GEOMETRIES", 3)
    monkeypatch.setattr(direct_calls, "known", {})
    shapes = [(1, 1, 2, 12), (1, 1, 3, 8), (1, 1, 4, 6), (1, 1, 6, 4)]  # with as many elements
    given = [torch.randn(shape) for shape in shapes]
    for x in (*given, given[0], given[3], given[2], given[1]):
        resample_add(x, [x.clone()])
    assert direct == [False] * 5 + [True] * 2 + [False]
    (entries,) = direct_calls.known.values()
    assert [fits(given[1], given[1].clone()) for fits, *_ in entries] == [True, False, False]
