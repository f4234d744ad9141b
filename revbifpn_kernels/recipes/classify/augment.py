"""torchvision's transforms: of an image in training, of one in evaluation, of a whole batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from ..run.order import drawing_from, seed_of
from ..run.samples import Skipped
from .data import Sample
from .options import Options

MEAN_STD = {"L": ((0.5,), (0.5,)), "RGB": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
CROP = 0.875  # of the shorter side, in evaluation


class CentreSquare(nn.Module):
    """Crops the centre square, then resizes; resizing first could make a strip image huge."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        crop = max(1, round(CROP * min(width, height)))
        top, left = (height - crop) // 2, (width - crop) // 2
        return functional.resized_crop(image, top, left, crop, crop, [self.side, self.side])


def for_training(options: Options, mode: str, side: int) -> nn.Module:
    """The transform of `--augment`, which draws from the global generators."""
    bilinear = InterpolationMode.BILINEAR
    steps: list[nn.Module] = []
    if options.augment in ("crop", "rand", "trivial"):
        steps += [v2.RandomResizedCrop(side), v2.RandomHorizontalFlip()]
    elif options.dataset == "folder":
        steps.append(CentreSquare(side))
    if options.augment == "affine":
        steps.append(v2.RandomAffine(12, (0.1, 0.1), (0.85, 1.15), 10, interpolation=bilinear))
    elif options.augment == "rand":
        steps.append(v2.RandAugment(interpolation=bilinear))
    elif options.augment == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=bilinear))
    steps += _to_tensor(options, mode)
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing))
    return v2.Compose(steps)


def for_evaluation(options: Options, mode: str, side: int) -> nn.Module:
    crop = [CentreSquare(side)] if options.dataset == "folder" else []
    return v2.Compose(crop + _to_tensor(options, mode))


def _to_tensor(options: Options, mode: str) -> list[nn.Module]:
    pixels = [v2.PILToTensor()] if options.dataset == "folder" else []
    scale = v2.ToDtype(torch.float32, scale=True)
    return [*pixels, scale, v2.Normalize(*MEAN_STD[mode])]


class Batch(NamedTuple):
    images: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,) of int64, or (N, classes) where images are mixed
    skipped: tuple[Skipped, ...]


class Collate:
    """Makes a `Batch` of samples, mixed by MixUp or CutMix if set, with the first sample's seed."""

    def __init__(self, classes: int = 0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        mixers = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        self.mix = v2.RandomChoice(mixers) if len(mixers) > 1 else (mixers or [None])[0]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        images = torch.stack([sample.image for sample in samples])
        labels = torch.tensor([sample.label for sample in samples])
        if self.mix is not None:
            with drawing_from(seed_of(samples[0].seed, 1)):
                images, labels = self.mix(images, labels)
        return Batch(images, labels, tuple(s for sample in samples for s in sample.skipped))
