"""Real inputs: feature pyramids of two photographs, at any shape.

Each of the C channels is one oriented Gabor filter (wavelength, angle, phase, colour axis), applied
to the photograph at every octave. So level l holds what a network's level l holds: edges and
textures of 2^(l+2) pixels, of unit variance, correlated between neighbours and between levels.
"""

import functools
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

STREAM_STRIDE = 4  # level 0 has 1/4 of the photograph's side, as behind RevBiFPN's stem
FILTER_SIDE = 11
VARIANTS = 8  # distinct images in a batch: two photographs, each cropped at four places


@functools.cache
def photographs() -> tuple[Tensor, Tensor]:
    """china.jpg and flower.jpg as float32 (3, 416, 640) in 0 to 1."""
    images = load_sample_images().images
    china, flower = (torch.tensor(image).movedim(-1, 0)[:, :416] / 255 for image in images)
    return china, flower


def _gabor_bank(channels: int) -> Tensor:
    """(channels, 3, side, side): orientations in steps of the golden angle, 3 waves, 3 colours."""
    index = torch.arange(channels)
    angle = (index * math.pi * (math.sqrt(5) - 1) / 2)[:, None, None]
    wavelength = torch.tensor([3.0, 4.5, 7.0])[index % 3][:, None, None]
    phase = (index // 3 % 2 * math.pi / 2)[:, None, None]
    grid = torch.arange(FILTER_SIDE) - FILTER_SIDE // 2
    rows, columns = grid[:, None], grid[None, :]
    along = columns * angle.cos() + rows * angle.sin()
    envelope = torch.exp(-(rows**2 + columns**2) / (2 * (0.45 * wavelength) ** 2))
    filters = envelope * torch.cos(2 * math.pi * along / wavelength + phase)
    filters = filters - filters.mean((1, 2), keepdim=True)
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])[index // 6 % 3]
    return filters[:, None] * axes[:, :, None, None]


@functools.cache
def _features(photograph: int, channels: int, level: int) -> Tensor:
    """(channels, h, w): the bank's responses at 1/(4·2^level) of the photograph's side."""
    image = photographs()[photograph][None]
    octave = F.avg_pool2d(image, STREAM_STRIDE // 2 * 2**level)
    padded = F.pad(octave, (FILTER_SIDE // 2,) * 4, mode="replicate")
    responses = F.conv2d(padded, _gabor_bank(channels), stride=2)[0]
    return responses / responses.std((1, 2), keepdim=True).clamp_min(1e-6)


def _mirrored(start: int, length: int, period: int) -> Tensor:
    """`length` indices from `start` on into a line of `period`, reflected at both ends."""
    position = torch.arange(start, start + length) % (2 * period)
    return torch.where(position < period, position, 2 * period - 1 - position)


def feature_maps(
    batch: int,
    channels: int,
    size: tuple[int, int],
    *,
    level: int = 0,
    shift: int = 0,
    device: str = "cpu",
) -> Tensor:
    """(batch, channels, *size) float32 features of octave `level`; `shift` picks other places."""
    variants = []
    for variant in range(min(batch, VARIANTS)):
        features = _features((variant + shift) % 2, channels, level)
        h, w = features.shape[1:]
        place = (variant // 2 + shift) / 4
        rows = _mirrored(int(place * h), size[0], h)
        columns = _mirrored(int(place * w), size[1], w)
        variants.append(features[:, rows][:, :, columns])
    distinct = torch.stack(variants) if variants else torch.empty(0, channels, *size)
    return distinct.to(device)[torch.arange(batch, device=device) % VARIANTS]


def color_pyramid(photograph: int, levels: int) -> list[Tensor]:
    """The photograph in colour at 1, 1/2, 1/4, … of its side, each (1, 3, h, w) in 0 to 1."""
    image = photographs()[photograph][None]
    return [image, *(F.avg_pool2d(image, 2**level) for level in range(1, levels))]
