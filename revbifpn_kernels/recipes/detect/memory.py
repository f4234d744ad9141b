"""Bytes that a detector's backbone holds for its backward, beside those of usual backbones.

Counted per allocation on fake tensors: nothing is computed, each machine gives the same numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from ...models.cost import Memory, training_memory
from ..run.errors import RunError
from ..run.networks import dtype_of, parameter_count
from ..run.tables import MIB
from . import networks
from .options import Options

SHOWN = ("revbifpn_s0", "revbifpn_s3")  # the smallest, and the one nearest to ResNet-50's size
NAME_WIDTH = 40
BATCHES = (2, 4)  # their difference is the share per image


class Row(NamedTuple):
    name: str
    parameters: int
    held_mib: float  # per image, between forward and backward
    peak_mib: float


def _resnet50_fpn(norm_layer: type[nn.Module], layers: int) -> nn.Module:
    """Trains the pyramid and the last `layers` of five."""
    return resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm_layer, trainable_layers=layers
    )


def _hrnet_w18() -> nn.Module:
    """The four maps of its last stage, without a neck or the layers before its classifier."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise RunError(f"--memory needs timm for HRNet-W18: {error}") from error
    maps = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}
    return timm.create_model("hrnet_w18", **maps)


def candidates(options: Options) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in dict.fromkeys((*SHOWN, options.model)):
        for reversible in (True, False):
            chosen = dataclasses.replace(options, model=name, reversible=reversible)
            mode = "reversible" if reversible else "stored"
            yield f"{name}, {mode}", lambda chosen=chosen: networks.backbone(chosen)
    yield "ResNet-50-FPN", lambda: _resnet50_fpn(nn.BatchNorm2d, 5)
    # What torchvision trains from given weights: constant norms, two frozen layers.
    yield "ResNet-50-FPN, frozen norms, 3 layers", lambda: _resnet50_fpn(FrozenBatchNorm2d, 3)
    yield "HRNet-W18", _hrnet_w18


def measured(name: str, model: nn.Module, side: int, dtype: torch.dtype | None) -> Row:
    few, many = (
        training_memory(model, (images, 3, side, side), autocast=dtype) for images in BATCHES
    )
    each = BATCHES[1] - BATCHES[0]
    share = Memory(*((b - a) / each / MIB for a, b in zip(few, many, strict=True)))
    return Row(name, parameter_count(model), share.held, share.peak)


def print_table(options: Options) -> None:
    dtype = dtype_of(options)
    side = options.image_size
    print(f"MiB an image of {side}×{side} adds to a step, {dtype or torch.float32}; trained with")
    print("all layers and batch norms unless said")
    print(f"{'backbone':<{NAME_WIDTH}}{'parameters':>12}{'held':>9}{'peak':>9}")
    for name, make in candidates(options):
        row = measured(name, make(), side, dtype)
        print(
            f"{row.name:<{NAME_WIDTH}}{row.parameters:>12,}{row.held_mib:>9.1f}{row.peak_mib:>9.1f}",
            flush=True,
        )
