"""Training memory of any network, counted on fake tensors: an image's share, and what fits."""

import functools
from dataclasses import dataclass

import torch

from revbifpn_kernels import create_model, training_memory

from .rivals import NETWORKS, PROVIDERS

MULTIPLE = 32  # of the sides that are tried: what every network here takes
COPIES = 3  # parameters, their gradients, the momentum of SGD


@dataclass(frozen=True)
class PerImage:
    """Bytes: what an image adds to a step, and what a step takes whatever the batch.

    Attributes:
        held: Between forward and backward, an image.
        peak: At the worst moment, an image.
        constant: Parameters, gradients, momentum, and what the step itself needs besides.
    """

    held: float
    peak: float
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
) -> PerImage:
    """The slope between batches of two and four: what does not grow with the batch cancels."""
    with torch.device("meta"):
        net = PROVIDERS[provider](_make(name, extra_silos))
    return slope(net, side, autocast)


def slope(net: torch.nn.Module, side: int, autocast: torch.dtype | None = None) -> PerImage:
    two, four = (training_memory(net, (n, 3, side, side), autocast=autocast) for n in (2, 4))
    held, peak = ((b - a) / 2 for a, b in zip(two, four, strict=True))
    parameters = sum(p.nbytes for p in net.parameters())
    return PerImage(held, peak, COPIES * parameters + two.peak - 2 * peak)


def _make(name: str, extra_silos: int | None) -> torch.nn.Module:
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
