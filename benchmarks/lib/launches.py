"""What a benchmarked network's training step launches on a GPU, found without one."""

import torch

from revbifpn_kernels import warmup

from .networks import LATTICE, fake_network


def calls_of_step(
    model_name: str,
    batch: int,
    side: int,
    autocast: torch.dtype | None = None,
    layout: str = "nchw",
    reversible: bool = True,
    *,
    is_exact: bool = False,
) -> list[warmup.OpCall]:
    """All calls of forward and backward, in order, on images of side × side pixels.

    With `is_exact` the network is the reversible one in exact mode.
    """
    net = fake_network(model_name, "reversible" if reversible or is_exact else "stored")
    if is_exact:
        net.lattice = LATTICE
    return warmup.calls_of_step(
        net, (batch, 3, side, side), autocast=autocast, channels_last=layout == "channels_last"
    )
