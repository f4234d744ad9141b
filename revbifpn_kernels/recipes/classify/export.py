"""Exports a trained network by torch.export and to ONNX, and compares each with the network."""

import importlib.util
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from ...models.revbifpn import RevBiFPN
from ..run.checkpoint import make_folder
from ..run.errors import RunError
from .augment import CROP, MEAN_STD
from .data import MODES, Evaluation

PROGRAM, ONNX, ABOUT = "network.pt2", "network.onnx", "network.json"
IMAGES = 4
# Largest error over the largest logit: other runtimes add in another order.
TOLERANCE = 1e-4


def prepare_folder(out: Path) -> None:
    """Makes the folder; raises before a long training if exporting will be impossible."""
    make_folder("--export", out)
    for name in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise RunError(f"--export needs {name}: pip install {name}")


def export(network: RevBiFPN, out: Path, views: Evaluation, classes: list[str]) -> str:
    """Exports the network in evaluation, for any number of images; returns how well it agrees.

    network.json beside it has what a caller must know: classes, side, mean, standard deviation.
    Raises `RunError` if an exported network does not compute what the network does.
    """
    network = network.eval()
    # Several: with a single image, exporters would take the number of images for fixed.
    images = torch.stack([views[k % len(views)].image for k in range(IMAGES)])
    with torch.no_grad(), warnings.catch_warnings():
        # About the exporter's own parts, and that a loaded program shares its file's memory.
        warnings.simplefilter("ignore")
        expected = network(images)
        outputs = {
            PROGRAM: _through_program(network, images, out / PROGRAM),
            ONNX: _through_onnx(network, images, out / ONNX),
        }
    largest = expected.abs().max().item()
    errors = {n: (y - expected).abs().max().item() / largest for n, y in outputs.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise RunError(
                f"--export: {out / name} must agree with the network to {TOLERANCE} of the "
                f"largest logit, got {error:.3g}"
            )
    mode = MODES[network.config.in_chans]
    mean, std = MEAN_STD[mode]
    about = {"classes": classes, "mode": mode, "crop": CROP, "interpolation": "bilinear"}
    about |= {"side": images.shape[-1], "mean": mean, "std": std}
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    listed = ", ".join(f"{name} to {error:.1e}" for name, error in errors.items())
    return f"exported to {out}; logits of {len(images)} test images agree: {listed} of the largest"


def _through_program(network: RevBiFPN, images: Tensor, path: Path) -> Tensor:
    shapes = {"image": {0: Dim.AUTO}}
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=shapes), path)
    program = torch.export.load(path).module()
    return torch.cat([program(part) for part in _parts(images)])


def _through_onnx(network: RevBiFPN, images: Tensor, path: Path) -> Tensor:
    import onnxruntime

    shapes = {"image": {0: Dim.AUTO}}
    torch.onnx.export(network, (images,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    parts = (session.run(None, {name: part.numpy()})[0] for part in _parts(images))
    return torch.cat([torch.from_numpy(part) for part in parts])


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """One image, then the others: the export must run on different batch sizes."""
    return tuple(part for part in (images[:1], images[1:]) if len(part))
