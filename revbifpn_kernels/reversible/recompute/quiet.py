"""Modules whose second run repeats the first without being watched call by call.

Watching costs about 5 µs a call of torch, a tenth of a small network's step. Layers of `torch.nn`
that neither draw nor keep statistics need none, nor do our own, which go through `call`.
"""

from collections.abc import Iterable

from torch import nn

TYPES: set[type] = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.GroupNorm, nn.LayerNorm, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Upsample, nn.PixelShuffle),
    nn.ZeroPad2d,
}


def is_quiet(parts: Iterable[nn.Module]) -> bool:
    """Whether all modules are of those types, without hooks, which might do anything."""
    return all(
        type(part) in TYPES and not part._forward_hooks and not part._forward_pre_hooks
        for part in parts
    )
