"""Memory that a detector's backbone holds for its backward, compared with usual backbones.

Counted per allocation on fake tensors: nothing is computed, every machine gives the same numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator

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


def _resnet50_fpn(norm_layer: type[nn.Module], layers: int) -> nn.Module:
    """ResNet-50-FPN of which the pyramid and the last `layers` of ResNet's five are trained."""
    return resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=norm_layer, trainable_layers=layers
    )


def _hrnet_w18() -> nn.Module:
    """HRNet-W18's four maps of the last stage, without a neck or the layers of its classifier."""
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


def measured(model: nn.Module, side: int, dtype: torch.dtype | None) -> Memory:
    """MiB per image: held between forward and backward, and at the peak."""
    shapes = [(images, 3, side, side) for images in BATCHES]
    few, many = (training_memory(model, shape, autocast=dtype) for shape in shapes)
    images = BATCHES[1] - BATCHES[0]
    return Memory(*((b - a) / images / MIB for a, b in zip(few, many, strict=True)))


def print_table(options: Options) -> None:
    dtype, side = dtype_of(options), options.image_size
    print(f"MiB per image of {side}×{side} in a training step, {dtype or torch.float32};")
    print("all layers and batch norms are trained unless said")
    print(f"{'backbone':<{NAME_WIDTH}}{'parameters':>12}{'held':>9}{'peak':>9}")
    for name, make in candidates(options):
        model = make()
        held, peak = measured(model, side, dtype)
        count = parameter_count(model)
        print(f"{name:<{NAME_WIDTH}}{count:>12,}{held:>9.1f}{peak:>9.1f}", flush=True)
