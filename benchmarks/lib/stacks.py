"""Stacks of RevBlocks and RevSilos in the sizes of RevBiFPN, for tests and benchmarks."""

import dataclasses

import torch
from torch import Tensor

from revbifpn_kernels import SIZES, Config, ReversibleSequential
from revbifpn_kernels.models.body import body, silo

CHANNELS = SIZES["revbifpn_s0"].widths
S6_CHANNELS = SIZES["revbifpn_s6"].widths
PER_LEVEL = (
    "neck_widths kernels extra_kernels expand_ratios se_ratios neck_expand_ratios neck_se_ratios"
).split()


def config_of(channels) -> Config:
    """Of that many levels and widths, otherwise S0."""
    s0 = SIZES["revbifpn_s0"]
    shortened = {name: getattr(s0, name)[: len(channels)] for name in PER_LEVEL}
    return dataclasses.replace(s0, widths=channels, **shortened, in_chans=1)


def silo_stack(depth: int, channels=CHANNELS, *, drop_path: float = 0.0) -> ReversibleSequential:
    """`depth` silos between all levels."""
    config = config_of(channels)
    silos = (silo(config, len(channels), drop_path=drop_path) for _ in range(depth))
    return ReversibleSequential(*silos)


def backbone(extra: int, channels=CHANNELS) -> ReversibleSequential:
    """The reversible part of RevBiFPN: levels are added one by one, then `extra` more silos."""
    return body(dataclasses.replace(config_of(channels), extra_silos=extra))


def streams(
    batch: int, side: int, channels=CHANNELS, *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Inputs of a stack: level 0 has a quarter of the image's `side`, each further level half."""
    return [
        torch.randn(batch, width, side // (4 << level), side // (4 << level), dtype=dtype)
        for level, width in enumerate(channels)
    ]
