"""Training memory of any network, counted on fake tensors: an image's share, and what fits."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from revbifpn_kernels import create_model, training_memory

from .rivals import NETWORKS, PROVIDERS

MULTIPLE = 32  # of the sides that are tried: what every network here takes
FEW = 2  # images: a batch and twice that give the slope
COPIES = 3  # parameters, their gradients, the momentum of SGD


@dataclass(frozen=True)
class PerImage:
    """Bytes: what an image adds to a step, and what a step takes whatever the batch.

    Attributes:
        held: Between forward and backward, an image.
        peak: At the worst moment, an image.
        parameters: Of the network.
        constant: Parameters, gradients, momentum, and what the step itself needs besides.
    """

    held: float
    peak: float
    parameters: int
    constant: float

    def batch_in(self, budget: int) -> int:
        return max(0, int((budget - self.constant) / self.peak))


@functools.cache
def per_image(
    name: str,
    provider: str,
    side: int,
    autocast: torch.dtype | None = None,
    extra_silos: int | None = None,
    images: int = FEW,
) -> PerImage:
    """Counted on fake tensors, of batches of `images` and twice as many.

    `extra_silos` as in `create_model`, the published ones if None.
    """
    net = PROVIDERS[provider](fake_network(name, extra_silos))
    few, twice = (
        training_memory(net, (n, 3, side, side), autocast=autocast) for n in (images, 2 * images)
    )
    return slope(net, few, twice, images)


def slope(
    net: nn.Module, few: tuple[int, int], twice: tuple[int, int], images: int = FEW
) -> PerImage:
    """From (held, peak) of a few and of twice as many images: what does not grow cancels."""
    parameters = sum(p.nbytes for p in net.parameters())
    held, peak = ((b - a) / images for a, b in zip(few, twice, strict=True))
    constant = COPIES * parameters + few[1] - images * peak
    return PerImage(held, peak, parameters, constant)


def fake_network(name: str, extra_silos: int | None = None) -> nn.Module:
    """A network that stores activations, on the meta device: no memory, no initialisation."""
    with torch.device("meta"):
        if extra_silos is None:
            return NETWORKS[name].make()
        options = {"drop_rate": 0.0, "drop_path_rate": 0.0, "reversible": False}
        return create_model(name, extra_silos=extra_silos, **options)


def largest_batch(
    name: str, provider: str, side: int, budget: int, autocast: torch.dtype | None = None
) -> int:
    """How many images train in `budget` bytes, parameters and optimizer in it; 0 if none does."""
    return per_image(name, provider, side, autocast).batch_in(budget)


def largest_side(name: str, provider: str, budget: int, autocast: torch.dtype | None = None) -> int:
    """The largest multiple of 32 pixels whose image trains in `budget` bytes; 0 if none does.

    What an image takes grows as its area, which gives a first guess; counting decides.
    """

    def fits(side: int) -> bool:
        return per_image(name, provider, side, autocast).batch_in(budget) >= 1

    known = 256
    counted = per_image(name, provider, known, autocast)
    room = max(budget - counted.constant, 0.0)
    side = int(known * (room / counted.peak) ** 0.5) // MULTIPLE * MULTIPLE
    while side > 0 and not fits(side):
        side -= MULTIPLE
    while side > 0 and fits(side + MULTIPLE):
        side += MULTIPLE
    return side
