"""Float64 results of the authors' network, and the tensors they were computed from.

No weights are stored: each tensor is drawn from a generator seeded with its name.
"""

import json
import math
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from revbifpn_kernels import create_model, load_official, to_official

FOLDER = Path(__file__).parent / "golden"
CASES = ("s0_cls_64", "s0_pyramid_96", "s0_backbone_only_64", "s2_cls_64")


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def official_shapes(size: str) -> dict[str, list[int]]:
    """The published checkpoint's names and shapes; in the file a shape is padded with zeros."""
    keys = arrays("official_keys")
    table = zip(keys[f"{size}.names"], keys[f"{size}.shapes"].tolist(), strict=True)
    return {name.decode(): [side for side in shape if side] for name, shape in table}


def read(case: str) -> dict:
    """Outputs, and by official name (norm, probe) of gradients and (sum, probe) of statistics."""
    stored = arrays(case)
    outputs: dict[str, dict] = defaultdict(dict)
    for key in stored:
        if key.startswith("outputs."):
            _, output, field = key.split(".")
            outputs[output][field] = stored[key]
    return {
        "meta": json.loads(str(stored["meta"])),
        "outputs": outputs,
        "grads": _numbers(stored, "grads"),
        "statistics": _numbers(stored, "running_stats_after_one_step"),
    }


def _numbers(stored: dict, part: str) -> dict[str, list[float]]:
    table = zip(stored[f"{part}.names"], stored[f"{part}.values"].tolist(), strict=True)
    return {name.decode(): pair for name, pair in table}


def drawn(seed: str, shape) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(seed.encode()))
    return torch.from_numpy(np.asarray(generator.standard_normal(tuple(shape))))


def weight(name: str, shape) -> Tensor:
    """The tensor that all golden results take for the official `name`."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    z = drawn(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.1 * z.abs()
    if name.endswith(".norm.weight"):
        return 1 + 0.1 * z
    if name.endswith(("running_mean", "bias")):
        return 0.1 * z
    return z / math.sqrt(math.prod(shape[1:]))


def image(meta: dict) -> Tensor:
    side = meta["image_size"]
    return drawn(f"input:{meta['name']}", (meta["batch"], 3, side, side))


def model(meta: dict, **options):
    overrides = meta["overrides"]
    net = create_model(
        meta["arch"],
        num_classes=overrides.get("classes", 1000),
        neck="head_channels" not in overrides,
        drop_rate=0.0,
        **options,
    ).double()
    load_official(net, {name: weight(name, t.shape) for name, t in to_official(net).items()})
    return net


def outputs(net, x: Tensor) -> list[Tensor]:
    result = net(x)
    return [result] if isinstance(result, Tensor) else result


def error(output: Tensor, expected: dict) -> float:
    """Relative to the norm; of a choice of elements where the output is large."""
    assert list(output.shape) == expected["shape"].tolist()
    values = output.detach().double().flatten()
    truth = torch.from_numpy(expected["values"])
    norm_error = 0.0
    if "index" in expected:
        norm_error = abs(values.norm().item() / expected["norm"].item() - 1)
        values = values[torch.from_numpy(expected["index"])]
    return max(norm_error, ((values - truth).norm() / truth.norm()).item())


def loss(ys: list[Tensor], meta: dict) -> Tensor:
    cotangents = (drawn(f"cotangent:{meta['name']}:{i}", y.shape) for i, y in enumerate(ys))
    return sum((y * c).mean() for y, c in zip(ys, cotangents, strict=True))


def probe(name: str, tensor: Tensor) -> float:
    return (tensor * drawn(f"probe:{name}", tensor.shape)).sum().item()
