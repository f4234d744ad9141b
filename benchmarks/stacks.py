"""Stacks of RevBlocks and RevSilos in the sizes of RevBiFPN, for tests and benchmarks."""

import torch
from torch import Tensor

from revbifpn_kernels import MBConv, RevBlock, ReversibleSequential, RevLevels, RevSilo

CHANNELS = (48, 64, 80, 160)  # of S0
S6_CHANNELS = (320, 416, 528, 1056)
KERNELS = (3, 5, 5, 5)
EXPAND_RATIOS = (1, 1, 2, 2)
SE_RATIOS = (0.25, 0.25, 0.125, 0.0)


def edge(i: int, j: int, channels, drop_path: float) -> MBConv:
    """The transform from level i to level j, as in RevBiFPN."""
    level, stride = min(i, j), 2 ** max(j - i, 0)
    kernel = 2 * stride - 1 if i < j else 5 if i == 3 else 3
    return MBConv(
        channels[i],
        channels[j],
        kernel,
        stride,
        expand_ratio=EXPAND_RATIOS[level],
        se_ratio=SE_RATIOS[level],
        drop_path=drop_path,
    )


def silo(channels=CHANNELS, *, inputs: int | None = None, drop_path: float = 0.0) -> RevSilo:
    """The silo of RevBiFPN between all levels; with fewer inputs it creates the last level."""
    levels = range(len(channels))
    edges = {
        (i, j): edge(i, j, channels, 0.0 if inputs is not None and j >= inputs else drop_path)
        for i in levels
        for j in levels
        if i != j
    }
    return RevSilo(edges, inputs=inputs)


def silo_stack(depth: int, channels=CHANNELS, *, drop_path: float = 0.0) -> ReversibleSequential:
    """`depth` silos between all levels."""
    return ReversibleSequential(*(silo(channels, drop_path=drop_path) for _ in range(depth)))


def residual_blocks(channels, drop_path: float = 0.0) -> RevLevels:
    """A residual block on each of the levels present, as in RevBiFPN."""

    def half(level: int, inputs: int, outputs: int) -> MBConv:
        return MBConv(
            inputs,
            outputs,
            KERNELS[level],
            expand_ratio=EXPAND_RATIOS[level],
            se_ratio=SE_RATIOS[level],
            drop_path=drop_path,
        )

    return RevLevels(
        *(
            RevBlock(half(level, c - c // 2, c // 2), half(level, c // 2, c - c // 2))
            for level, c in enumerate(channels)
        )
    )


def backbone(extra: int, channels=CHANNELS) -> ReversibleSequential:
    """The reversible part of RevBiFPN: levels are added one by one, then `extra` more silos."""
    parts = []
    for levels in range(1, len(channels)):
        parts += [residual_blocks(channels[:levels]) for _ in range(2)]
        parts.append(silo(channels[: levels + 1], inputs=levels))
    for _ in range(extra):
        parts += [residual_blocks(channels) for _ in range(2)]
        parts.append(silo(channels))
    return ReversibleSequential(*parts)


def streams(
    batch: int, side: int, channels=CHANNELS, *, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Inputs of a stack: level 0 has a quarter of the image's `side`, each further level half."""
    return [
        torch.randn(batch, width, side // (4 << level), side // (4 << level), dtype=dtype)
        for level, width in enumerate(channels)
    ]
