"""For tests of `capture_step`: CUDA graphs without a GPU, small networks, steps to compare with.

Instead of a CUDA graph the operators of a step are recorded, and run again on the same tensors.
"""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from revbifpn_kernels import MBConv, capture

SIDE, BATCH = 64, 4
# Operators that make the host wait for the device.
WAITING = {
    *"_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 unique_dim".split(),
    *"bincount repeat_interleave.Tensor".split(),
}


class Graph(TorchDispatchMode):
    """Records the operators of a step; a replay writes to the tensors of the recording.

    As a capture does, it raises an error for operators that make the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if {name, f"{name}.{func._overloadname}"} & WAITING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        call = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, results))
        self.calls.append((func, *call))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self.calls:
            inputs = set(map(storage_of, tree_leaves((args, kwargs))))
            results = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(recorded), results, strict=True):
                if isinstance(old, Tensor) and storage_of(old) not in inputs:
                    old.copy_(new)


def storage_of(leaf) -> int | None:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, Tensor) else None


def capture_on_cpus(patch: pytest.MonkeyPatch) -> list[Graph]:
    """Let a step on a CPU be captured by `Graph`s; return those captured, as they come."""
    graphs, stream = [], SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def record(graph, stream):
        with graph:
            yield
        graphs.append(graph)

    patch.setattr(capture, "obstacle_of", lambda model: None)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", record)
    patch.setattr(torch.cuda, "Stream", lambda device: stream)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    return graphs


def update_on_cpus(patch: pytest.MonkeyPatch, kind: type) -> None:
    """Let updates of this kind of optimizer be captured on a CPU."""
    module = sys.modules[(torch.optim.Adam if kind is torch.optim.AdamW else kind).__module__]
    if hasattr(module, "_get_capturable_supported_devices"):
        patch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


def batches(count: int, images: int = BATCH) -> list[tuple]:
    return [(torch.randn(images, 3, SIDE, SIDE), torch.arange(images)) for _ in range(count)]


def sgd(net: nn.Module, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": 0.05, "momentum": 0.9} | settings)


def small() -> nn.Module:
    layers = MBConv(3, 8, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers)


def linear() -> tuple:
    """A network, its optimizer, and a batch."""
    net = nn.Linear(8, 4)
    return net, sgd(net), (torch.randn(2, 8), torch.arange(2))


def eager_step(net, optimizer, batch, max_norm=None, scaler=None) -> tuple[Tensor, Tensor]:
    """Make a step without a graph; return the loss and the norm of the gradients."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(batch[0]), batch[1])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), norm


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    for (name, ours), theirs in zip(
        left.state_dict().items(), right.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
