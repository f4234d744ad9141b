"""`capture_step` on a GPU: its CUDA graph trains as steps without one, and a failed capture."""

import copy

import pytest
import torch
import torch.nn.functional as F
from captures import linear, small
from tiny import tiny
from torch import nn

from revbifpn_kernels import capture, capture_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NETWORKS = [(tiny, torch.optim.SGD), (tiny, torch.optim.AdamW), (tiny, torch.optim.NAdam)]
NETWORKS += [(small, kind) for kind in capture.CAPTURABLE]


def batch_of(images: int, device="cuda") -> tuple:
    return torch.randn(images, 3, 64, 64, device=device), torch.arange(images, device=device)


def eager_step(net, optimizer, batch, scaler, dtype=None):
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(net(batch[0]), batch[1])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), norm


def assert_trains_as_eager(make, kind, dtype=None, tolerance=1e-3):
    """From a state that steps without a graph left; the second batch has another shape."""
    net = make().cuda()
    twin = copy.deepcopy(net)
    optimizers = [kind(each.parameters(), lr=1e-3) for each in (net, twin)]
    scalers = [torch.amp.GradScaler("cuda", 1024.0, enabled=dtype is not None) for _ in range(2)]
    first = batch_of(4)
    for each in zip((net, twin), optimizers, scalers, strict=True):
        eager_step(each[0], each[1], first, each[2], dtype)
    generator = torch.cuda.get_rng_state()
    step = capture_step(
        *(net, F.cross_entropy, optimizers[0], batch_of(4, "cpu")),
        autocast=dtype,
        max_norm=1.0,
        scaler=scalers[0] if dtype else None,
    )
    assert step.obstacle is None
    assert step.updates_in_graph == (dtype is None and kind in capture.CAPTURABLE)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    for lr, images in ((1e-3, 4), (1e-3, 2), (1e-4, 4), (1e-4, 4)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        batch = batch_of(images)
        loss = step(*batch)
        expected, norm = eager_step(twin, optimizers[1], batch, scalers[1], dtype)
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(step.grad_norm, norm, rtol=10 * tolerance, atol=0.0)


@pytest.mark.parametrize(("make", "kind"), NETWORKS)
def test_a_captured_step_trains_as_an_eager_one(make, kind):
    """NAdam's update follows the graph."""
    assert_trains_as_eager(make, kind)


def test_a_captured_step_with_scaled_gradients():
    assert_trains_as_eager(tiny, torch.optim.SGD, torch.float16, 1e-2)


def test_each_replay_draws_anew():
    torch.manual_seed(0)
    net, batch = tiny(drop_path_rate=0.5).cuda(), batch_of(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    step = capture_step(net, F.cross_entropy, optimizer, batch)
    assert step.obstacle is None
    assert len({step(*batch).item() for _ in range(3)}) == 3


def waits(outputs, labels):
    loss = F.cross_entropy(outputs, labels)
    return loss * (1.0 if loss.item() > 0 else 2.0)


def test_a_capture_that_failed_leaves_the_gpu_as_it_was():
    """Its stream and its random generator, too; other steps can be captured."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 64 * 64, 10)).cuda()
    optimizer, batch = torch.optim.AdamW(net.parameters(), lr=1e-3), batch_of(4)
    home, weights = torch.cuda.current_stream(), copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="the step runs without a CUDA graph"):
        step = capture_step(net, waits, optimizer, batch)
    assert torch.cuda.current_stream() == home
    assert optimizer.param_groups[0]["lr"] == 1e-3 and not optimizer.state
    assert all(torch.equal(now, weights[name]) for name, now in net.state_dict().items())
    assert step(*batch).isfinite()
    step = capture_step(net, F.cross_entropy, optimizer, batch)
    assert step.obstacle is None
    assert len({step(*batch).item() for _ in range(3)}) == 3


def test_an_error_of_the_step_is_raised():
    net, _, (inputs, labels) = linear()
    net.cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="shapes"):
        capture_step(net, F.cross_entropy, optimizer, (inputs[:, :3], labels))
    assert capture_step(net, F.cross_entropy, optimizer, (inputs, labels)).obstacle is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu():
    net, _, batch = linear()
    net.to("cuda:1")
    before = net.weight.detach().clone()
    step = capture_step(net, F.cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1), batch)
    assert step.obstacle is None and torch.equal(net.weight, before)
    step(*batch)
    assert torch.cuda.current_device() == 0 and not torch.equal(net.weight, before)
