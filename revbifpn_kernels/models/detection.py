"""RevBiFPN as the backbone of torchvision's detectors."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .revbifpn import RevBiFPN


class DetectionBackbone(nn.Module):
    """Brings the pyramid of a RevBiFPN to one width: what `FasterRCNN(backbone, …)` expects.

    `backbone(images)` returns {"0": …, "1": …, …, "pool": …}: a map of (N, out_channels, ⌈H/s⌉,
    ⌈W/s⌉) for each level, strides s = 4, 8, 16, 32 unless `levels` says otherwise, then `extra`
    coarser ones of every second pixel. Images may have any sides from 32 pixels on: what is no
    multiple of 4 is padded with zeros inside.

    Args:
        model: Made with num_classes=0.
        out_channels: Of all maps.
        levels: Which levels of the pyramid, 0 the finest. RetinaNet's anchors suit (1, 2, 3) with
            extra=2, strides 8 to 128; what serves only a level left out, as the neck there, gets no
            gradient (`find_unused_parameters=True` under DDP).
        extra: How many coarser maps to add.

    Raises:
        ValueError: The model has a head, or lacks a level.
    """

    def __init__(
        self,
        model: RevBiFPN,
        out_channels: int = 256,
        *,
        levels: Sequence[int] = (0, 1, 2, 3),
        extra: int = 1,
    ) -> None:
        super().__init__()
        if model.head is not None:
            raise ValueError(
                "DetectionBackbone: model must have no head, which would not be trained; make it "
                "with num_classes=0"
            )
        if not levels or not set(levels) <= set(range(model.config.levels)):
            raise ValueError(
                f"DetectionBackbone: levels must be among 0 to {model.config.levels - 1}, got "
                f"{tuple(levels)}"
            )
        self.model = model
        self.out_channels, self.levels, self.extra = out_channels, tuple(levels), extra
        widths = model.config.pyramid_widths
        self.laterals = nn.ModuleList(nn.Conv2d(widths[k], out_channels, 1) for k in levels)
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
