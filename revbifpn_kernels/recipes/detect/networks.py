"""torchvision's Faster R-CNN and Mask R-CNN on the pyramid of a RevBiFPN."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ...models.create import create_model
from ...models.detection import DetectionBackbone
from ..run.errors import RunError
from ..run.networks import dtype_of, freeze, hint_of, refuse_settings
from .options import Options

DROPPED = {"drop_rate": 0.0}  # the classifier's, which a backbone does not have
TRUNK = "backbone.model"  # the name of a RevBiFPN in a detector
BOX_BINS, MASK_BINS = 7, 14  # per side of a pooled box


class Heads(NamedTuple):
    """Settings of the detector's heads, which depend on the size of images and objects."""

    anchors: tuple[float, ...]  # square roots of their areas, in pixels of their level
    ratios: tuple[float, ...]  # of height to width
    extra: int  # levels beyond the pyramid's
    points: int  # samples per side of a bin; their gradient is slow on CPUs
    representation: int
    box_layers: tuple[int, ...]  # channels of convolutions; none: two linear layers
    mask_layers: tuple[int, ...]
    proposals: dict[str, float]


HEADS = {
    "digits": Heads(
        anchors=(3.0, 4.25),
        ratios=(1.5,),
        extra=0,
        points=1,
        representation=256,
        box_layers=(64,),
        mask_layers=(64, 64),
        proposals={
            "rpn_pre_nms_top_n_train": 300,
            "rpn_pre_nms_top_n_test": 300,
            "rpn_post_nms_top_n_train": 150,
            "rpn_post_nms_top_n_test": 100,
            "rpn_batch_size_per_image": 64,
            "box_batch_size_per_image": 32,
            "box_positive_fraction": 0.5,
        },
    ),
    "coco": Heads((8.0,), (0.5, 1.0, 2.0), 1, 2, 1024, (), (256,) * 4, {}),
}


class Trunk(DetectionBackbone):
    """The backbone, the only part under autocast; it returns float32 maps.

    torchvision's heads cast boxes to the precision of the maps, and bfloat16 counts pixels beyond
    256 by twos: thin objects would lose their width.
    """

    autocast: torch.dtype | None = None

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        if self.autocast is None:
            return super().forward(images)
        with torch.autocast(images.device.type, self.autocast):
            maps = super().forward(images)
        return OrderedDict((name, x.float()) for name, x in maps.items())


def backbone(options: Options) -> Trunk:
    """The model's backbone, without autocast."""
    settings = dict(options.settings)
    refuse_settings(settings)
    if options.lattice is not None:
        settings["lattice"] = options.lattice
    try:
        model = create_model(
            options.model,
            num_classes=0,
            reversible=options.reversible,
            checkpoint=options.checkpoint,
            **DROPPED | settings,
        )
    except (OSError, TypeError, ValueError) as error:
        hint = _hint_of(options.checkpoint) if options.checkpoint else ""
        raise RunError(f"--model, --set or --checkpoint: {error}{hint}") from error
    if model.config.in_chans != 3:
        raise RunError(f"--set in_chans must be 3, got {model.config.in_chans}")
    freeze(model, options.freeze)
    return Trunk(
        model,
        options.out_channels,
        levels=range(model.config.levels),
        extra=HEADS[options.dataset].extra,
    )


def _hint_of(weights: str) -> str:
    """For an error message: what kind of file this is, if one of our commands wrote it."""
    try:
        names = torch.load(weights, map_location="cpu", weights_only=True)["model"]
        is_detector = any(name.startswith(f"{TRUNK}.") for name in names)
    except Exception:  # not a file of PyTorch's
        return hint_of(weights)
    return "; it is a detector's checkpoint, which --resume auto continues" if is_detector else ""


def build(options: Options, classes: int) -> FasterRCNN:
    """The detector before the first step; label 0 is the background."""
    torch.manual_seed(options.seed)
    trunk, heads = backbone(options), HEADS[options.dataset]
    trunk.autocast = dtype_of(options)
    strides = trunk.model.config.strides
    strides += tuple(strides[-1] << k + 1 for k in range(heads.extra))
    sizes = tuple(tuple(a * stride for a in heads.anchors) for stride in strides)
    names = [str(k) for k in range(len(trunk.levels))]
    numbers = heads.proposals | {
        "num_classes": None,
        "min_size": options.image_size,
        "max_size": options.image_size,
        "rpn_anchor_generator": AnchorGenerator(sizes, (heads.ratios,) * len(sizes)),
        "box_roi_pool": _pool(names, BOX_BINS, heads),
        "box_head": _box_head(trunk.out_channels, heads),
        "box_predictor": FastRCNNPredictor(heads.representation, classes + 1),
    }
    if not options.masks:
        return FasterRCNN(trunk, **numbers)
    width = heads.mask_layers[-1]
    return MaskRCNN(
        trunk,
        **numbers,
        mask_roi_pool=_pool(names, MASK_BINS, heads),
        mask_head=MaskRCNNHeads(trunk.out_channels, heads.mask_layers, dilation=1),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
    )


def frozen(options: Options) -> list[str]:
    """Names of a detector's parts that are not trained."""
    return [f"{TRUNK}.{part}" for part in options.freeze]


def _box_head(channels: int, heads: Heads) -> nn.Module:
    """Convolutions with norms before one layer learn in fewer steps than two layers."""
    if not heads.box_layers:
        return TwoMLPHead(channels * BOX_BINS**2, heads.representation)
    size = (channels, BOX_BINS, BOX_BINS)
    return FastRCNNConvFCHead(
        size, heads.box_layers, (heads.representation,), norm_layer=nn.BatchNorm2d
    )


def _pool(names: list[str], bins: int, heads: Heads) -> MultiScaleRoIAlign:
    """A box of 28 times the smallest anchor is pooled at stride 16, as torchvision's of 224."""
    return MultiScaleRoIAlign(names, bins, heads.points, canonical_scale=28 * heads.anchors[0])
