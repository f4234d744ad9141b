"""The backbone under torchvision's detectors: they train and infer on images of any size."""

import pytest
import torch
from tiny import tiny

pytest.importorskip("torchvision", reason="an extra")
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

from revbifpn_kernels import DetectionBackbone

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"min_size": 96, "max_size": 160}


def backbone(**options):
    return DetectionBackbone(tiny(num_classes=0), out_channels=16, **options)


def images_and_targets():
    images = [torch.rand(3, 97, 131), torch.rand(3, 75, 64)]
    targets = []
    for image in images:
        boxes = torch.tensor([[5.0, 8.0, 40.0, 50.0], [20.0, 10.0, 60.0, 70.0]])
        masks = torch.zeros(2, *image.shape[1:], dtype=torch.uint8)
        masks[:, 10:40, 20:40] = 1
        targets.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks})
    return images, targets


@pytest.mark.parametrize(
    "make",
    [
        lambda: FasterRCNN(backbone(), num_classes=3, **SIZES),
        pytest.param(lambda: MaskRCNN(backbone(), num_classes=3, **SIZES), marks=pytest.mark.slow),
        lambda: RetinaNet(backbone(levels=(1, 2, 3), extra=2), num_classes=3, **SIZES),
    ],
    ids=["FasterRCNN", "MaskRCNN", "RetinaNet"],
)
@pytest.mark.filterwarnings("ignore:.*not found to be deterministic|.*does not have a determin")
def test_detectors(make):
    detector = make()
    images, targets = images_and_targets()
    losses = detector(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    untrained = {n for n, p in detector.backbone.named_parameters() if p.grad is None}
    left_out = (
        () if 0 in detector.backbone.levels else ("model.neck.levels.0.", "model.body.11.up.")
    )
    assert all(name.startswith(left_out) for name in untrained)
    with torch.no_grad():
        found = detector.eval()(images)
    assert len(found) == 2 and {"boxes", "labels", "scores"} <= set(found[0])


@pytest.mark.parametrize("side", [(64, 96), (97, 131), (33, 50)])
def test_maps_of_images_of_any_size(side):
    maps = backbone(levels=iter((1, 2, 3)), extra=2).eval()(torch.randn(1, 3, *side))
    assert list(maps) == ["0", "1", "2", "pool", "pool1"]
    for stride, x in zip((8, 16, 32, 64, 128), maps.values(), strict=True):
        assert x.shape == (1, 16, -(-side[0] // stride), -(-side[1] // stride))
