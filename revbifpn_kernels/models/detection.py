"""RevBiFPN as the backbone of torchvision's detectors."""

from collections import OrderedDict
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import as_whole, whole
from .revbifpn import RevBiFPN


class DetectionBackbone(nn.Module):
    """Projects the pyramid of a RevBiFPN to one width, as `FasterRCNN(backbone, …)` expects.

    `backbone(images)` returns {"0": …, "1": …, …, "pool": …}: one map of (N, out_channels, ⌈H/s⌉,
    ⌈W/s⌉) per level, strides s = 4, 8, 16, 32 unless `levels` says otherwise, then `extra` coarser
    maps, each every second pixel of the one before. Images may have any sides from 32 pixels on.

    Args:
        model: Made with num_classes=0.
        out_channels: Channels of every map.
        levels: Which levels of the pyramid, 0 the finest. RetinaNet's anchors suit (1, 2, 3) with
            extra=2, strides 8 to 128. What serves only an omitted level, such as its neck, gets no
            gradient (`find_unused_parameters=True` under DDP).
        extra: How many coarser maps to add.

    Raises:
        TypeError, ValueError: The model is not a RevBiFPN, has a head, or lacks a level; a number
            is out of range.
    """

    def __init__(
        self,
        model: RevBiFPN,
        out_channels: int = 256,
        *,
        levels: Iterable[int] = (0, 1, 2, 3),
        extra: int = 1,
    ) -> None:
        super().__init__()
        self.levels = _checked_levels(model, levels)
        self.out_channels = whole("DetectionBackbone", "out_channels", out_channels, 1)
        self.extra = whole("DetectionBackbone", "extra", extra)
        self.model = model
        widths = [model.config.pyramid_widths[k] for k in self.levels]
        self.laterals = nn.ModuleList(nn.Conv2d(c, self.out_channels, 1) for c in widths)
        for lateral in self.laterals:
            nn.init.kaiming_uniform_(lateral.weight, a=1)
            nn.init.zeros_(lateral.bias)

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        pyramid = self.model.pyramid(images)
        maps = [lateral(pyramid[k]) for k, lateral in zip(self.levels, self.laterals, strict=True)]
        named = OrderedDict((str(k), x) for k, x in enumerate(maps))
        for k in range(self.extra):
            named["pool" if k == 0 else f"pool{k}"] = maps[-1] = F.max_pool2d(maps[-1], 1, 2)
        return named


def _checked_levels(model: RevBiFPN, levels: Iterable[int]) -> tuple[int, ...]:
    """`levels` as a tuple; raises if the model cannot be a backbone, or lacks one of them."""
    if not isinstance(model, RevBiFPN):
        raise TypeError(
            f"DetectionBackbone: model must be a RevBiFPN, got {type(model).__name__}; timm's "
            "wrappers do not fit"
        )
    if model.head is not None:
        raise ValueError(
            "DetectionBackbone: model must have no head, which would not be trained; create it by "
            "revbifpn_kernels.create_model with num_classes=0 (timm.create_model keeps the head)"
        )
    finest_to_coarsest = range(model.config.levels)
    given = tuple(levels) if isinstance(levels, Iterable) else None
    checked = tuple(map(as_whole, given or ()))
    if not checked or not all(level in finest_to_coarsest for level in checked):
        raise ValueError(
            f"DetectionBackbone: levels must be among 0 to {finest_to_coarsest[-1]}, one or more, "
            f"got {levels if given is None else given!r}"
        )
    return checked
