"""The reversible body of RevBiFPN: residual blocks on each level, and silos between them."""

from ..blocks import RevBlock, RevLevels
from ..mbconv import MBConv
from ..reversible import Reversible, ReversibleSequential
from ..silo import RevSilo
from .sizes import Config

LAYERS_BETWEEN_SILOS = 2


def body(config: Config) -> ReversibleSequential:
    """Silos that each create one level, then `extra_silos` more, with residual blocks between."""
    levels = config.levels
    streams = [*range(1, levels), *[levels] * config.extra_silos]  # how many enter each silo
    blocks: list[Reversible] = []
    for position, count in enumerate(streams, start=1):
        drop_path = config.drop_path_rate * position / len(streams)
        blocks += [residual(config, count, drop_path) for _ in range(LAYERS_BETWEEN_SILOS)]
        is_growing = position < levels
        blocks.append(silo(config, count + is_growing, is_growing, drop_path))
    return ReversibleSequential(*blocks, lattice=config.lattice)


def residual(config: Config, levels: int, drop_path: float = 0.0) -> RevLevels:
    """A residual block on each of the first `levels` levels."""

    def half(level: int) -> MBConv:
        channels, kernel = config.widths[level] // 2, config.kernels[level]
        options = config.mbconv_options(level)
        return MBConv(channels, channels, kernel, drop_path=drop_path, **options)

    return RevLevels(*(RevBlock(half(level), half(level)) for level in range(levels)))


def silo(config: Config, levels: int, is_growing: bool = False, drop_path: float = 0.0) -> RevSilo:
    """The silo that fuses the first `levels` levels; if `is_growing`, it creates the last one."""

    def edge(i: int, j: int) -> MBConv:
        stride = 2 ** max(j - i, 0)
        kernel = (2 * stride - 1 if i < j else 3) + config.extra_kernels[i]
        is_new = is_growing and j == levels - 1
        options = {"drop_path": 0.0 if is_new else drop_path} | config.mbconv_options(min(i, j))
        return MBConv(config.widths[i], config.widths[j], kernel, stride, **options)

    pairs = [(i, j) for i in range(levels) for j in range(levels) if i != j]
    edges = {pair: edge(*pair) for pair in pairs}
    return RevSilo(edges, config.mode, inputs=levels - 1 if is_growing else None)
