"""What is compared: the networks a user would pick instead, and the ways to train one of ours.

Dropout and stochastic depth are 0 in all of them.
"""

import contextlib
import copy
import functools
import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revbifpn_kernels import SIZES, MBConv, RevBiFPN, create_model, to_official

from .bifpn import BiFPN

LATTICE = 2.0**-12
# How much of the activations the compiler may keep where it recomputes by itself.
COMPILER_BUDGET = 0.1
UNDROPPED = {"drop_rate": 0.0, "drop_path_rate": 0.0}
EFFICIENTNET_SIDES = (224, 240, 260, 300, 380, 456, 528, 600)


@dataclass(frozen=True)
class Network:
    """A network, and the side in pixels of the images that it was made for."""

    make: Callable[[], nn.Module]
    side: int


NETWORKS = {
    name: Network(
        functools.partial(create_model, name, reversible=False, **UNDROPPED), config.resolution
    )
    for name, config in SIZES.items()
}
NETWORKS |= {
    f"efficientnet_b{k}": Network(
        functools.partial(timm.create_model, f"efficientnet_b{k}", **UNDROPPED), side
    )
    for k, side in enumerate(EFFICIENTNET_SIDES)
}
NETWORKS |= {
    f"hrnet_w{width}": Network(
        functools.partial(timm.create_model, f"hrnet_w{width}", drop_rate=0.0), 224
    )
    for width in (18, 32, 48)
}
NETWORKS["bifpn_b0"] = Network(BiFPN, 512)


def _reversible(net: RevBiFPN, lattice: float | None = None) -> nn.Module:
    net.reversible, net.lattice = True, lattice
    return net


def _checkpointed(net: RevBiFPN) -> nn.Module:
    """PyTorch recomputes each block in the backward."""
    for block in (*net.body, net.neck, net.head):
        block.reversible = False
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return net


def _reversible_compiled(net: RevBiFPN) -> nn.Module:
    # The transforms differ in their sizes, and all run the same few lines of Python.
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 4096
    for module in net.modules():
        if isinstance(module, MBConv):
            module.compile()
    return _reversible(net)


def _stored_compiled(net: nn.Module, **options) -> nn.Module:
    net.compile(**options)
    return net


class _CompilerRecomputes(nn.Module):
    """A network whose compiler keeps a share of the activations and recomputes the rest."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        net.compile()

    def forward(self, image: Tensor):
        with torch._functorch.config.patch(activation_memory_budget=COMPILER_BUDGET):
            return self.net(image)


# Name → what makes it of a network that stores activations; the first run without a compiler.
EAGER = {
    "reversible": _reversible,
    "exact": functools.partial(_reversible, lattice=LATTICE),
    "stored": lambda net: net,
    "checkpoint": _checkpointed,
}
COMPILED = {
    "reversible+compile": _reversible_compiled,
    "stored+compile": _stored_compiled,
    "compiler recomputes": _CompilerRecomputes,
}
# With CUDA graphs of the compiler's own.
TUNED = {"stored+max-autotune": functools.partial(_stored_compiled, mode="max-autotune")}
# On GPUs: the whole step is one CUDA graph.
GRAPH = "+graph"
GRAPHS = {
    name + GRAPH: (EAGER | COMPILED)[name]
    for name in ("reversible", "stored", "reversible+compile", "stored+compile")
}
PROVIDERS = EAGER | COMPILED | TUNED | GRAPHS
OURS = ("reversible", "exact", "checkpoint", "reversible+compile")  # rather than of any network


def fake_network(name: str, provider: str = "stored", **changes) -> nn.Module:
    """A network on the meta device: no memory, no initialisation; `changes` are for ours alone."""
    with torch.device("meta"):
        return PROVIDERS[provider](NETWORKS[name].make(**changes))


def providers_of(
    name: str, providers: Iterable[str], official: Path | None = None
) -> dict[str, nn.Module]:
    """The network in each of the ways to train it that fit it, all with the same weights."""
    base = NETWORKS[name].make()
    is_ours = isinstance(base, RevBiFPN)
    wanted = [key for key in providers if is_ours or key.removesuffix(GRAPH) not in OURS]
    nets = {key: PROVIDERS[key](copy.deepcopy(base)) for key in wanted}
    if is_ours and official is not None:
        weights = {key: t.detach().clone() for key, t in to_official(base).items()}
        theirs = official_models(official, name)
        for net in theirs.values():
            net.load_state_dict(weights)
        nets |= theirs
    return nets


def official_models(folder: Path, name: str) -> dict[str, nn.Module]:
    """The authors' network in their two modes, imported from a checkout of theirs."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import revbifpn

    make = functools.partial(revbifpn.model_fns[name], head_dropout=0.0, stochastic_depth=0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its image size
        return {
            "official reversible": make(),
            "official stored": make(disable_rev=True, disable_recomp=True),
        }


def gradients(net: nn.Module) -> Tensor:
    """All of them in one vector; those of ours and of the authors in the same order."""
    inner = net.net if isinstance(net, _CompilerRecomputes) else net
    named = to_official(inner) if isinstance(inner, RevBiFPN) else dict(inner.named_parameters())
    parts = (named[key].grad for key in sorted(named))
    return torch.cat([grad.flatten() for grad in parts if grad is not None])
