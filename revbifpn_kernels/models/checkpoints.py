"""Loads weights from files and state_dicts, under our names or the authors': all or none."""

import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .official import is_official, translated
from .revbifpn import RevBiFPN
from .sizes import SIZES

COUNTER = ".num_batches_tracked"
CLASSIFIER = ("classifier.weight", "classifier.bias")
NESTS = ("state_dict", "model")  # keys under which training scripts store the weights
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DDP and torch.compile put before names


def load_official(model: RevBiFPN, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy a published checkpoint into `model`: a file or a state_dict with the authors' names.

    Parts that `model` lacks (neck, head, classifier) are skipped. A classifier of another number
    of classes keeps its initialisation, with a warning. Reading a file executes nothing in it. The
    dictionaries of training scripts ({"state_dict": …}, {"model": …}) and names with "module."
    before them are accepted as well.

    Raises:
        ValueError: It is not a checkpoint of this model; then nothing in `model` has changed.
    """
    op = "load_official"
    weights = _unwrapped(op, source)
    if not is_official(weights):
        raise ValueError(
            f"{op}: expected the authors' names, such as rev_stack.1.…, got {_few(weights)}"
        )
    _load(op, model, weights)


def load_checkpoint(model: RevBiFPN, path: str | Path) -> None:
    """Copy a file of weights, under our names or the authors', into `model`."""
    weights = _unwrapped("load_checkpoint", path)
    _load("load_official" if is_official(weights) else "load_checkpoint", model, weights)


def fitting(
    op: str, model: RevBiFPN, source: Mapping[str, Tensor], notify: Callable[[str], object]
) -> dict[str, Tensor]:
    """Return `source` under our names, without a classifier of another number of classes.

    `notify` is called with a message about such a classifier.

    Raises:
        ValueError: A tensor is missing, unexpected or of another shape or kind; `model` has not
            changed.
    """
    own = model.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"{op}: model must hold memory, got one on the meta device; give it some by "
            "model.to_empty(device=…)"
        )
    weights = translated(model, _unwrapped(op, source))
    # Norms that do not count batches, such as frozen ones, take the same checkpoints.
    weights = {n: w for n, w in weights.items() if n in own or not n.endswith(COUNTER)}
    if other_classes := _other_classes(own, weights):
        notify(
            f"{op}: the classifier keeps its initialisation, because the checkpoint has "
            f"{other_classes} classes and the model {model.num_classes}"
        )
        for name in CLASSIFIER:
            del own[name], weights[name]
    if complaint := _complaint(own, weights):
        hint = _size_hint(model, weights)
        raise ValueError(f"{op}: the checkpoint is not of this model: it {complaint}{hint}")
    return weights


def _load(op: str, model: RevBiFPN, source: Mapping[str, Tensor]) -> None:
    # Not strict, because a classifier may be left out.
    model.load_state_dict(fitting(op, model, source, _warn), strict=False)


def _warn(message: str) -> None:
    """Warn at the line outside this package whose call led here."""
    package = __name__.partition(".")[0] + "."
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _other_classes(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a complete classifier in `weights`, if it is not the model's."""
    if not all(name in own and name in weights for name in CLASSIFIER):
        return None
    weight, bias = (weights[name] for name in CLASSIFIER)
    features = own[CLASSIFIER[0]].shape[1:]
    is_whole = weight.dim() == 2 and weight.shape[1:] == features and bias.shape == weight.shape[:1]
    return len(bias) if is_whole and bias.shape != own[CLASSIFIER[1]].shape else None


def _unwrapped(op: str, source: str | Path | Mapping) -> dict[str, Tensor]:
    """The tensors of a file or a dictionary, without the prefixes of training scripts."""
    is_file = isinstance(source, str | Path)
    weights = _read(op, Path(source)) if is_file else source
    if isinstance(weights, Mapping):
        nested = [weights[key] for key in NESTS if isinstance(weights.get(key), Mapping)]
        weights = dict((nested or [weights])[0])
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        got = type(weights).__name__
        got += f" of {_few(weights)}" if isinstance(weights, dict) else ""
        where = source if is_file else "the checkpoint"
        raise ValueError(f"{op}: {where} must hold tensors by name, got {got}")
    while weights and all(name.startswith(WRAPPERS) for name in weights):
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    return weights


def _read(op: str, path: Path):
    """The content of a file; nothing in it is executed."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        if re.match(r"https?:/", str(path)):
            what = "is an address; download it first"
        raise FileNotFoundError(f"{op}: {path} {what}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ImportError(f"{op}: reading {path} needs `pip install safetensors`") from error
    except Exception as error:
        # PyTorch's messages about unsafe files advise to execute them.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise ValueError(
                f"{op}: {path} is not a checkpoint, or holds more than tensors; nothing in it was "
                "executed"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{op}: {path} is damaged or not a checkpoint: {reason}") from error


def _complaint(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Why `weights` cannot be copied into `own`; empty if they can."""
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    common = [name for name in own if name in weights]
    kinds = [name for name in common if not _is_kind_of(weights[name], own[name])]
    shapes = [n for n in common if n not in kinds and weights[n].shape != own[n].shape]
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} of {len(own)} tensors, such as {missing[0]}")
    if unexpected:
        parts.append(f"has {len(unexpected)} that the model lacks, such as {unexpected[0]}")
    for names, what, property_of in (
        (kinds, "kind", _kind),
        (shapes, "shape", lambda tensor: tuple(tensor.shape)),
    ):
        if names:
            expected, got = (property_of(tensors[names[0]]) for tensors in (own, weights))
            example = f"{names[0]} expected {expected}, got {got}"
            parts.append(f"has {len(names)} of another {what}: {example}")
    return "; it ".join(parts)


def _is_kind_of(tensor: Tensor, own: Tensor) -> bool:
    # Counters of batches may be floating-point: casting a whole state_dict makes them so.
    kinds = _kind(tensor), _kind(own)
    return kinds[0] == kinds[1] or kinds == ("floating-point", "integer")


def _kind(tensor: Tensor) -> str:
    """What must be equal for a copy to keep the values; precisions may differ."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else str(tensor.layout)
    for kind in ("meta", "quantized"):
        if getattr(tensor, f"is_{kind}"):
            return kind
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "integer"


def _size_hint(model: RevBiFPN, weights: Mapping[str, Tensor]) -> str:
    """Which published size has the checkpoint's width, if the model has another."""
    first = weights.get("body.0.levels.0.f.project.norm.weight")
    width = 0 if first is None else 2 * first.numel()
    if width in (0, model.config.widths[0]):
        return ""
    sizes = [name for name, config in SIZES.items() if config.widths[0] == width]
    return f"; it looks like {sizes[0]}" if sizes else f"; its finest stream has {width} channels"


def _few(weights: Mapping) -> str:
    names = [str(name) for name in list(weights)[:3]]
    return f"{', '.join(names) or 'nothing'}{', …' if len(weights) > 3 else ''}"
