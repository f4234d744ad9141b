"""`capture_step`: which changes, errors and models are refused, and what is left unchanged then."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from captures import (
    assert_same_state,
    batches,
    eager_step,
    linear,
    sgd,
    small,
    update_on_cpus,
)
from helpers import same_bits
from tiny import tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from revbifpn_kernels import MBConv, ReversibleSequential, RevSilo, capture, capture_step


def weight_decay(net, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.1


def loaded_state(net, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def another_group(net, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def moved(net, optimizer):
    net[0].double().float()


def frozen(net, optimizer):
    net[0].weight.requires_grad_(False)


def unfrozen(net, optimizer):
    net[1].requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weight_decay, "changes of weight_decay: capture again"),
        (loaded_state, "changes of the optimizer's state:"),
        (another_group, "changes of param_groups:"),
        (moved, "changes of the model's parameters:"),
        (frozen, "changes of the model's parameters:"),
        (unfrozen, "changes of the model's parameters:"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("is_in_graph", [True, False], ids=["in-graph", "after-graph"])
def test_changes_after_the_capture_are_refused(graphs, monkeypatch, change, message, is_in_graph):
    """Those of the optimizer only if the graph contains its update."""
    if not is_in_graph:
        monkeypatch.setattr(capture, "CAPTURABLE", ())
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4).requires_grad_(False))
    optimizer, batch = sgd(net), (torch.randn(2, 8), torch.arange(2))
    step = capture_step(net, F.cross_entropy, optimizer, batch)
    step(*batch)
    change(net, optimizer)
    if is_in_graph or "parameters" in message:
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(RuntimeError, match=f"capture_step: expected .*, got {message}"):
            step(*batch)
        assert same_bits(net.state_dict(), before)
    else:
        step(*batch)


def about(optimizer) -> list:
    """Everything of an optimizer that a capture may change, but for values of its tensors."""
    entries = [tuple(entry.items()) for entry in optimizer.state.values()]
    return [*(dict(group) for group in optimizer.param_groups), entries]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("is_new", [True, False])
def test_what_fails_in_the_capture_runs_without_a_graph(graphs, monkeypatch, kind, is_new):
    def loss(outputs, labels):
        value = F.cross_entropy(outputs, labels)
        return value * (1.0 if value.item() > 0 else 2.0)

    update_on_cpus(monkeypatch, kind)
    net = small()
    twin = copy.deepcopy(net)
    example, *others = batches(3)
    optimizers = [kind(each.parameters(), lr=0.05) for each in (net, twin)]
    for each in zip((net, twin), optimizers, strict=True):
        if not is_new:
            eager_step(*each, others[0])
    before = about(optimizers[0])
    with pytest.warns(UserWarning, match="not permitted when .*; the step runs without a CUDA"):
        step = capture_step(net, loss, optimizers[0], example)
    assert same_bits(net.state_dict(), twin.state_dict())
    assert about(optimizers[0]) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one message in all
        found = step(*others[1])
    expected, _ = eager_step(twin, optimizers[1], others[1])
    torch.testing.assert_close(found, expected)
    assert_same_state(net, twin)


@pytest.mark.parametrize(("calls", "error"), [(0, RuntimeError), (0, ValueError), (2, ValueError)])
def test_errors_of_the_step_are_raised(graphs, calls, error):
    """Even RuntimeError, which later calls raise if they cannot be captured."""
    seen = []

    def loss(outputs, labels):
        seen.append(1)
        if len(seen) > calls:
            raise error("out of memory")
        return F.cross_entropy(outputs, labels)

    net, optimizer, batch = linear()
    before, weights = about(optimizer), copy.deepcopy(net.state_dict())
    with pytest.raises(error, match="out of memory"):
        capture_step(net, loss, optimizer, batch)
    assert about(optimizer) == before and same_bits(net.state_dict(), weights)


def test_an_update_that_fails_leaves_no_gradients(graphs):
    def fail(*_):
        raise RuntimeError("needs the host")

    net, optimizer, batch = linear()
    optimizer.register_step_post_hook(fail)
    with pytest.warns(UserWarning, match="needs the host; the step runs without a CUDA graph"):
        capture_step(net, F.cross_entropy, optimizer, batch)
    assert all(p.grad is None for p in net.parameters())


def silo(*layers) -> RevSilo:
    return RevSilo({(0, 1): nn.Sequential(MBConv(8, 8, stride=2), *layers)})


def on_a_gpu(make) -> nn.Module:
    """A model whose parameters say that they are on a GPU."""
    net = make()
    with FakeTensorMode(), torch.device("cuda"):
        for module in net.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape))
    return net


@pytest.fixture
def two_processes():
    """One process that believes in another one."""
    dist = torch.distributed
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "^DataParallel communicates"),
        (lambda: DistributedDataParallel(nn.Linear(2, 2)), "^DistributedDataParallel communicates"),
        (lambda: nn.Sequential(fully_shard(nn.Linear(2, 2))), r"^FSDPLinear \(0\) communicates"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(2)), r"^SyncBatchNorm \(0\) communicates"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(2)).eval(), None),
        (
            lambda: nn.Sequential(ReversibleSequential(silo(nn.Dropout2d(0.1)))),
            r"Dropout2d \(0\.0\.down\.0_1\.1\) is inside a reversible block",
        ),
        (lambda: nn.Sequential(silo(nn.Dropout(0.0)), nn.Dropout(0.1)), None),
        (lambda: tiny(drop_path_rate=0.1), None),
    ],
)
def test_what_cannot_be_captured_is_named(two_processes, make, message):
    found = capture.obstacle_of(on_a_gpu(make))
    assert found is None if message is None else re.search(message, found)


def test_what_an_update_reads_moves_to_the_gpu():
    net = on_a_gpu(lambda: nn.Linear(2, 2))
    optimizer = torch.optim.Adam(net.parameters())
    with FakeTensorMode() as mode:
        steps = {p: {"step": mode.from_tensor(torch.ones(()))} for p in net.parameters()}
        optimizer.state.update(steps)
        capture._make_capturable(optimizer)
    read = [state["step"] for state in optimizer.state.values()]
    assert len(read) == 2
    assert {t.device.type for t in (*read, optimizer.param_groups[0]["lr"])} == {"cuda"}


def test_a_model_on_a_cpu_runs_without_a_graph():
    net = tiny()
    with pytest.warns(UserWarning, match="must be on a GPU, got parameters on cpu"):
        step = capture_step(net, F.cross_entropy, sgd(net), *batches(1))
    assert step.obstacle and step(*batches(1)[0]).isfinite()


@pytest.mark.parametrize(
    ("example", "settings", "error", "message"),
    [
        (torch.zeros(1), {}, TypeError, "example must be .*, got Tensor"),
        ((), {}, TypeError, "example must be"),
        ((torch.zeros(1), 3), {}, TypeError, "tensors only, got int"),
        ((torch.zeros(1),), {"max_norm": 0.0}, ValueError, "max_norm must be positive, got 0.0"),
    ],
)
def test_bad_arguments(example, settings, error, message):
    net = nn.Linear(2, 2)
    with pytest.raises(error, match=f"capture_step: .*{message}"):
        capture_step(net, F.cross_entropy, sgd(net), example, **settings)
