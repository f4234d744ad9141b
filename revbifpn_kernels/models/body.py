"""The reversible body of RevBiFPN: residual blocks on each level, and silos between them."""

from ..blocks import RevBlock, RevLevels
from ..mbconv import MBConv
from ..reversible import Reversible, ReversibleSequential
from ..silo import RevSilo
from .sizes import Config

LAYERS_BETWEEN_SILOS = 2


def body(config: Config) -> ReversibleSequential:
    """From the stem's stream to all levels, each created by a silo; then `extra_silos` more."""
    levels = config.levels
    streams = [*range(1, levels), *[levels] * config.extra_silos]  # before each silo
    blocks: list[Reversible] = []
    for position, count in enumerate(streams, start=1):
        drop_path = config.drop_path_rate * position / len(streams)
        blocks += [residual(config, count, drop_path) for _ in range(LAYERS_BETWEEN_SILOS)]
        is_growing = position < levels
        blocks.append(silo(config, count + is_growing, is_growing, drop_path))
    return ReversibleSequential(*blocks, lattice=config.lattice)


def residual(config: Config, levels: int, drop_path: float = 0.0) -> RevLevels:
    """A residual block on each of the first `levels` levels."""

    def half(level: int, in_channels: int, out_channels: int) -> MBConv:
        kernel = config.kernels[level]
        return _mbconv(config, level, in_channels, out_channels, kernel, drop_path=drop_path)

    return RevLevels(
        *(
            RevBlock(half(level, c - c // 2, c // 2), half(level, c // 2, c - c // 2))
            for level, c in enumerate(config.widths[:levels])
        )
    )


def silo(config: Config, levels: int, is_growing: bool = False, drop_path: float = 0.0) -> RevSilo:
    """The silo between the first `levels` levels, of which it creates the last if growing."""

    def edge(i: int, j: int) -> MBConv:
        stride = 2 ** max(j - i, 0)
        kernel = (2 * stride - 1 if i < j else 3) + config.extra_kernels[i]
        is_new = is_growing and j == levels - 1
        return _mbconv(
            config,
            min(i, j),
            config.widths[i],
            config.widths[j],
            kernel,
            stride=stride,
            drop_path=0.0 if is_new else drop_path,
        )

    pairs = [(i, j) for i in range(levels) for j in range(levels) if i != j]
    edges = {pair: edge(*pair) for pair in pairs}
    return RevSilo(edges, config.mode, inputs=levels - 1 if is_growing else None)


def _mbconv(config: Config, level: int, *channels_and_kernel: int, **options) -> MBConv:
    return MBConv(
        *channels_and_kernel,
        expand_ratio=config.expand_ratios[level],
        se_ratio=config.se_ratios[level],
        norm_layer=config.norm_layer,
        act_layer=config.act_layer,
        **options,
    )
