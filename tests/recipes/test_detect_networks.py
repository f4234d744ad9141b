"""The detector of `revbifpn_kernels.detect`: its boxes are exact in whatever the trunk computes."""

import torch
from detections import TINY, detect

from revbifpn_kernels.detect import main
from revbifpn_kernels.recipes.detect import memory, networks, options

# Less than a pixel wide, where neighbours in bfloat16 are two pixels apart.
THIN = [401.2, 100.0, 402.0, 130.0]


def test_boxes_reach_the_heads_exactly_under_autocast(monkeypatch):
    model = networks.build(options.parse([*TINY, "--image-size=512", "--amp=bfloat16"]), 10)
    seen = []
    select = model.roi_heads.select_training_samples

    def noting(proposals, targets):
        seen.extend([*proposals, *(target["boxes"] for target in targets)])
        return select(proposals, targets)

    monkeypatch.setattr(model.roi_heads, "select_training_samples", noting)
    target = {"boxes": torch.tensor([THIN]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 512, 512)] * 2, [target] * 2)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(boxes.dtype == torch.float32 for boxes in seen)
    assert torch.equal(seen[-1], target["boxes"])


def test_autocast_reaches_the_trunk_and_found_boxes_are_float32():
    model = networks.build(options.parse([*TINY, "--amp=bfloat16"]), 10).eval()
    model.roi_heads.score_thresh = 0.0
    dtypes = []
    model.backbone.laterals[0].register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    with torch.no_grad():
        (found,) = model([torch.rand(3, 64, 64)])
    assert dtypes == [torch.bfloat16] and len(found["boxes"])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_a_detector_is_told_from_the_weights_of_a_backbone(tmp_path, capsys):
    kept = detect(tmp_path / "run") / "checkpoint.pt"
    assert main([*TINY, f"--checkpoint={kept}", f"--out={tmp_path / 'other'}"]) == 1
    assert "it is a detector's checkpoint, which --resume auto continues" in capsys.readouterr().err


def test_memory_is_counted_under_autocast():
    chosen = options.parse([*TINY, "--no-reversible"])
    model = networks.backbone(chosen)
    counts = [memory.measured(model, 64, dtype) for dtype in (None, torch.bfloat16)]
    assert counts[1].held < 0.8 * counts[0].held
