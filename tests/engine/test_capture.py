"""`capture_step`: what a graph would replay, what is put back after the warm-up, what is refused.

Without a GPU a stand-in for the graph runs the step again at each replay.
"""

import copy
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from tiny import tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from revbifpn_kernels import MBConv, ReversibleSequential, RevSilo, capture, capture_step

SIDE, BATCH = 64, 4
# Operators that make the host wait for the device.
WAITING = {
    *"_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 unique_dim".split(),
    *"bincount repeat_interleave.Tensor".split(),
}


def batches(count: int, images: int = BATCH) -> list[tuple]:
    return [(torch.randn(images, 3, SIDE, SIDE), torch.arange(images)) for _ in range(count)]


def sgd(net: nn.Module, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.05, "momentum": 0.9} | settings)


def eager_step(net, optimizer, batch, max_norm=None):
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm or float("inf"))
    optimizer.step()
    return loss.detach(), norm


@pytest.fixture
def replays(monkeypatch):
    """Lets a step be captured without a GPU; counts the replays."""
    count = []

    def recorded(step):
        for _ in range(capture.WARM_UPS):
            step()

        def replay():
            count.append(1)
            step()

        return replay

    monkeypatch.setattr(capture, "obstacle_of", lambda model: None)
    monkeypatch.setattr(capture, "recorded", recorded)
    return count


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    for (name, ours), theirs in zip(
        left.state_dict().items(), right.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_replays_train_as_steps_one_by_one(replays, kind):
    """While the learning rate changes; AdamW cannot be captured here and follows the graph."""
    net = tiny()
    twin = copy.deepcopy(net)
    nets = net, twin
    make = sgd if kind == "SGD" else lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3)
    optimizers = [make(each) for each in nets]
    example, *others = batches(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "CAPTURABLE", (torch.optim.SGD,))
        step = capture_step(net, F.cross_entropy, optimizers[0], example, max_norm=1.0)
    assert step.updates_in_graph == (kind == "SGD") and step.obstacle is None
    for k, batch in enumerate(others):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 / (k + 1)
        loss = step(*batch)
        expected, norm = eager_step(twin, optimizers[1], batch, 1.0)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(step.grad_norm, norm, rtol=1e-3, atol=1e-5)
    assert len(replays) == len(others)
    assert_same_state(net, twin)


def test_the_warm_up_is_undone(replays):
    """Weights, running statistics, momentum and random numbers, bit for bit."""
    net = tiny()
    optimizer, (first, example) = sgd(net), batches(2)
    eager_step(net, optimizer, first)
    before = copy.deepcopy([net.state_dict(), list(optimizer.state.values())])
    capture_step(net, F.cross_entropy, optimizer, example)
    assert same_bits([net.state_dict(), list(optimizer.state.values())], before)


def test_a_new_state_of_the_optimizer_starts_with_zeros(replays):
    net = tiny()
    optimizer = sgd(net)
    capture_step(net, F.cross_entropy, optimizer, *batches(1))
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(buffers) == len(list(net.parameters()))
    assert not any(buffer.any() for buffer in buffers)


def test_other_shapes_run_without_the_graph(replays):
    net = tiny()
    twin = copy.deepcopy(net)
    optimizers = sgd(net), sgd(twin)
    (example, last), (short,) = batches(2), batches(1, images=2)
    step = capture_step(net, F.cross_entropy, optimizers[0], example)
    for batch in (short, last):
        step(*batch)
        eager_step(twin, optimizers[1], batch)
    assert len(replays) == 1
    assert_same_state(net, twin)


def test_losses_and_norms_are_not_overwritten(replays):
    net = tiny()
    step = capture_step(net, F.cross_entropy, sgd(net), *batches(1), max_norm=1.0)
    found = []
    for batch in batches(2):
        found += [step(*batch), step.grad_norm]
    assert len({tensor.data_ptr() for tensor in found}) == 4


def test_a_changed_setting_is_refused(replays):
    net = tiny()
    optimizer = sgd(net)
    example, other = batches(2)
    step = capture_step(net, F.cross_entropy, optimizer, example)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="capture_step: .* another weight_decay; expected"):
        step(*other)
    assert same_bits(net.state_dict(), before)


def test_what_fails_in_the_capture_runs_without_a_graph(monkeypatch):
    def recorded(step):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "obstacle_of", lambda model: None)
    monkeypatch.setattr(capture, "recorded", recorded)
    net = tiny()
    twin = copy.deepcopy(net)
    example, other = batches(2)
    with pytest.warns(UserWarning, match="not permitted when .*; the step runs without a CUDA"):
        step = capture_step(net, F.cross_entropy, sgd(net), example)
    assert same_bits(net.state_dict(), twin.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one message in all
        loss = step(*other)
    expected, _ = eager_step(twin, sgd(twin), other)
    torch.testing.assert_close(loss, expected)
    assert_same_state(net, twin)


def silo(*layers) -> RevSilo:
    return RevSilo({(0, 1): nn.Sequential(MBConv(8, 8, stride=2), *layers)})


def on_a_gpu(make) -> nn.Module:
    """A model whose parameters say that they are on a GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        return make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "DataParallel communicates"),
        (
            lambda: nn.Sequential(ReversibleSequential(silo(nn.Dropout2d(0.1)))),
            r"Dropout2d \(0\.0\.down\.0_1\.1\) is inside a reversible block",
        ),
        (lambda: nn.Sequential(silo(nn.Dropout(0.0)), nn.Dropout(0.1)), None),
        (lambda: tiny(drop_path_rate=0.1), None),
    ],
)
def test_what_cannot_be_captured_is_named(make, message):
    found = capture.obstacle_of(on_a_gpu(make))
    assert found is None if message is None else re.search(message, found)


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


class Refuses(TorchDispatchMode):
    """Raises for operators that make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func._schema.name.removeprefix("aten::")
        assert not {packet, f"{packet}.{func._overloadname}"} & WAITING, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("lattice", [None, 2**-12])
def test_no_operator_of_a_step_waits_for_the_device(replays, lattice, is_autocast):
    net = tiny(lattice=lattice, drop_path_rate=0.1)
    dtype = torch.bfloat16 if is_autocast else None
    example, other = batches(2)
    arguments = F.cross_entropy, sgd(net), example
    step = capture_step(net, *arguments, autocast=dtype, max_norm=1.0)
    step(*other)  # what is asked once per geometry has been asked
    with Refuses():
        assert step(*other).isfinite
    with Refuses(), pytest.raises(AssertionError):
        step(*other).item()


@pytest.mark.parametrize("kind", capture.CAPTURABLE)
def test_no_captured_update_waits_for_the_device(replays, monkeypatch, kind):
    """Nor reads a learning rate that has been captured: another one changes the update."""
    module = sys.modules[(torch.optim.Adam if kind is torch.optim.AdamW else kind).__module__]
    if hasattr(module, "_get_capturable_supported_devices"):
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    net = nn.Linear(8, 4)
    optimizer, batch = kind(net.parameters(), lr=0.01), (torch.randn(2, 8), torch.arange(2))
    step = capture_step(net, F.cross_entropy, optimizer, batch)
    assert step.updates_in_graph
    step(*batch)
    before, changes = copy.deepcopy(net.weight.detach()), []
    for lr in (0.01, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        with Refuses():
            step(*batch)
        changes.append((net.weight - before).abs().max().item())
        before = copy.deepcopy(net.weight.detach())
    assert changes[0] > 0 and changes[1] == 0
