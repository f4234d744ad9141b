"""What is found out once about modules is found out again when they change."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from chains import conv, mbconv, silos, streams
from helpers import same_bits
from mbconvs import OPTIONS, image, make
from steps import assert_same_bits, gradients_of
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from revbifpn_kernels import RevBlock, ReversibleSequential
from revbifpn_kernels.reversible.recompute.snapshot import Snapshot


class OtherConv(nn.Conv2d):
    pass


def hook(net):
    net.depthwise.conv.register_forward_hook(lambda *_: None)


def pre_hook(net):
    net.project.norm.register_forward_pre_hook(lambda *_: None)


def backward_hook(net):
    net.expand.register_full_backward_hook(lambda *_: None)


def own_forward(net):
    net.expand.conv.forward = net.expand.conv.forward


def other_class(net):
    net.expand.conv.__class__ = OtherConv


def other_activation(net):
    net.depthwise.act = nn.GELU()


def another_part(net):
    net.expand.append(nn.Identity())


def bias(net):
    net.project.conv.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))


def no_bias(net):
    net.squeeze_excite.reduce.bias = None


def padding(net):
    net.depthwise.conv.padding_mode = "circular"


def average(net):
    net.project.norm.momentum = None


def attribute(net):
    weight = net.project.conv.weight
    del net.project.conv.weight
    net.project.conv.weight = weight.detach()


def precision(net):
    net.project.norm.float()


def strides(net):
    net.project.norm.weight.data = torch.ones(24, 2, dtype=torch.float64)[:, 0]


CHANGES = [hook, pre_hook, backward_hook, own_forward, other_class, other_activation, another_part]
CHANGES += [bias, no_bias, padding, average, attribute, precision, strides]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_are_not_fused(change):
    net, x = make(OPTIONS["all"]), image()
    assert net._stages(x) is not None and net._stages(x) is net._stages(x)
    change(net)
    assert net._stages(x) is None
    if change is not strides:  # copies are dense
        assert copy.deepcopy(net)._stages(x) is None


def test_hooks_of_any_part():
    net, x = make(OPTIONS["all"]), image()
    for part in list(net.modules())[1:]:
        assert net._stages(x) is not None
        handle = part.register_full_backward_pre_hook(lambda *_: None)
        assert net._stages(x) is None, part
        handle.remove()


def eval_of_a_norm(net):
    net.expand.norm.eval()


def a_part_less(net):
    del net.depthwise


def probability(net):
    net.drop_path.probability = 0.9


def module(net):
    net.expand.conv = copy.deepcopy(net.expand.conv)
    net.expand.conv.weight.data.neg_()


def activations(net):
    net.expand.act = nn.SiLU()


def parameter(net):
    net.project.norm.weight = nn.Parameter(torch.full((24,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [eval_of_a_norm, a_part_less, probability, module, activations, parameter],
    ids=lambda c: c.__name__,
)
def test_changes_of_fused_modules_are_seen(change):
    net, x = make(OPTIONS["all"]), image()
    net(x)
    change(net)
    fresh = copy.deepcopy(net)
    ys = []
    for each in (net, fresh):
        torch.manual_seed(1)
        ys.append(each(x))
        assert each._stages(x) is not None
    assert same_bits(*ys)


def test_hooks_of_all_modules():
    net, x = make(OPTIONS["all"]), image()
    assert net._stages(x)
    with register_module_forward_hook(lambda *_: None):
        assert net._stages(x) is None
    assert net._stages(x)


def drop(net):
    net[0].f[0] = nn.Dropout(0.5)


def drop_by_a_hook(net):
    net[0].f[0].register_forward_hook(lambda module, x, y: nn.functional.dropout(y, 0.5))


def normalise(net):
    net[1].g.append(nn.BatchNorm2d(4))


def add_a_parameter(net):
    net[0].f[0].register_parameter("bias", nn.Parameter(torch.ones(4)))


def replace_a_transform(net):
    net[0].f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5))


@pytest.mark.parametrize(
    "change",
    [drop, drop_by_a_hook, normalise, add_a_parameter, replace_a_transform],
    ids=lambda change: change.__name__,
)
def test_changes_of_blocks_are_seen(change):
    def transform():
        return nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Tanh())

    net = ReversibleSequential(
        *(RevBlock(transform(), transform()) for _ in range(2)), lattice=2.0**-12
    )
    x = torch.randn(2, 8, 6, 6)
    gradients_of(net, [x])
    change(net)
    twin = copy.deepcopy(net)
    twin.reversible = False
    for net_ in twin:
        net_.reversible = False
    found = []
    for each in (net, twin):
        each.zero_grad()
        torch.manual_seed(2)
        found.append(gradients_of(each, [x]))
    assert_same_bits(*found)


def test_nothing_is_made_twice_if_nothing_changes(monkeypatch):
    net, xs = silos(2, mbconv), streams(silos)
    for _ in range(2):  # the snapshot of a block sees those of its transforms come
        gradients_of(net, xs)

    def refuse(*_):
        raise AssertionError("a snapshot was made again")

    monkeypatch.setattr(Snapshot, "__init__", refuse)
    gradients_of(net, xs)


def test_a_shallow_copy_with_other_parts_is_seen():
    net, x = make(OPTIONS["all"]), image()
    assert net._stages(x) is not None
    twin = copy.copy(net)
    twin._modules = {**net._modules, "project": nn.Identity()}
    assert twin._stages(x) is None
    assert net._stages(x) is not None


class Remembers(nn.Conv2d):
    """Keeps its last result, as feature extractors do."""

    def forward(self, x):
        y = super().forward(x)
        self.last, self.results = y, [y]
        return y


def test_maps_that_a_module_remembers_live_no_longer_than_it_keeps_them():
    net = ReversibleSequential(RevBlock(Remembers(4, 4, 1), Remembers(4, 4, 1)))
    x = torch.randn(2, 8, 6, 6)
    for _ in range(2):  # the second call makes the snapshot of modules that remember
        gradients_of(net, [x])
    f = net[0].f
    died = weakref.ref(f.last), weakref.ref(f.results[0])
    f.last, f.results = None, None
    gc.collect()
    assert [ref() for ref in died] == [None, None]


@pytest.mark.parametrize("change", [replace_a_transform, drop], ids=lambda change: change.__name__)
def test_a_module_replaced_before_the_backward_is_refused(change):
    net = ReversibleSequential(*(RevBlock(conv(4, 4), nn.Sequential(conv(4, 4))) for _ in range(2)))
    net[0].f = nn.Sequential(conv(4, 4))
    (y,) = net(torch.randn(2, 8, 6, 6))
    change(net)
    with pytest.raises(RuntimeError, match="RevBlock: a module inside .* was replaced after"):
        y.sum().backward()


def test_snapshots_are_neither_copied_nor_saved_nor_kept_alive():
    net, xs = silos(1, mbconv), streams(silos)
    keys = net.state_dict().keys()
    gradients_of(net, xs)
    assert isinstance(net[0].__dict__["_snapshot"], Snapshot)
    assert net.state_dict().keys() == keys
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].__dict__["_snapshot"] is None
    died = weakref.ref(net[0])
    gc.collect()
    gc.disable()
    try:
        del net, twin
        assert died() is None
    finally:
        gc.enable()
