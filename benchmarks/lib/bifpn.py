"""A BiFPN of EfficientDet's shape in plain PyTorch, to measure against."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5  # P3 to P7
EPSILON = 1e-4  # keeps the weights of a fusion from dividing by zero


class FusedConv(nn.Module):
    """Depthwise-separable convolution of a weighted mean of maps of one size."""

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, *maps: Tensor) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + EPSILON)
        fused = sum(weight * x for weight, x in zip(weights, maps, strict=True))
        return self.norm(self.pointwise(self.depthwise(F.silu(fused))))


class BiFPNLayer(nn.Module):
    """Fuses P3 … P7 from coarse to fine, then from fine to coarse."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(FusedConv(channels, 2) for _ in range(LEVELS - 1))
        self.down = nn.ModuleList(
            FusedConv(channels, 3 if level < LEVELS - 1 else 2) for level in range(1, LEVELS)
        )

    def forward(self, *maps: Tensor) -> list[Tensor]:
        tops = list(maps)
        for level in reversed(range(LEVELS - 1)):
            enlarged = F.interpolate(tops[level + 1], tops[level].shape[2:], mode="nearest")
            tops[level] = self.up[level](maps[level], enlarged)
        outs = tops[:1]
        for level in range(1, LEVELS):
            reduced = F.adaptive_max_pool2d(outs[-1], tops[level].shape[2:])
            # The coarsest level has no map of its own from the way up.
            own = (maps[level], tops[level]) if level < LEVELS - 1 else (maps[level],)
            outs.append(self.down[level - 1](*own, reduced))
        return outs


class BiFPN(nn.Module):
    """Features of a timm EfficientNet, then BiFPN layers; returns P3 … P7, as EfficientDet-D0."""

    def __init__(self, backbone="efficientnet_b0", channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=(2, 3, 4))
        widths = self.backbone.feature_info.channels()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, channels, 1), nn.BatchNorm2d(channels, eps=1e-3))
            for c in [*widths, widths[-1]]
        )
        self.layers = nn.ModuleList(BiFPNLayer(channels) for _ in range(layers))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.backbone(image)
        *fine, p6 = (
            lateral(x) for lateral, x in zip(self.laterals, [*features, features[-1]], strict=True)
        )
        p6 = _halved(p6)
        maps = [*fine, p6, _halved(p6)]
        for layer in self.layers:
            maps = layer(*maps)
        return maps


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)
