"""The published checkpoints: the authors' names for our tensors, and files of weights.

Position n of the authors' stack is block n − 1 of `body`: their position 0 is the stem. Of a silo
of L levels their `g` counts levels from the coarsest, so their up edge (a, b) is
our (L − 1 − a, L − 1 − b).
"""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..blocks import RevBlock, RevLevels
from ..silo import RevSilo
from .revbifpn import RevBiFPN
from .sizes import SIZES

COUNTER = ".num_batches_tracked"
_PARTS = {  # of an MBConv, ours and theirs
    "expand.": "exp_conv.",
    "depthwise.": "dw_conv.",
    "squeeze_excite.reduce.": "se.se.1.",
    "squeeze_excite.expand.": "se.se.3.",
    "project.": "project_conv.",
}


def load_official(model: RevBiFPN, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy a published checkpoint into `model`: a file or a state_dict with the authors' names.

    Parts that `model` lacks (head, neck) are passed over. A classifier of another number of classes
    is left as it is, with a warning. A file is read without executing anything in it.

    Raises:
        ValueError: It is no checkpoint of this model; then nothing of `model` has changed.
    """
    weights = _read("load_official", source) if isinstance(source, str | Path) else source
    if not any(name.startswith("rev_stack.") for name in weights):
        raise ValueError(
            "load_official: expected the authors' names, such as rev_stack.1.…, got "
            f"{_few(weights)}"
        )
    _load("load_official", model, translated(model, weights))


def translated(model: RevBiFPN, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under our names instead of the authors', without the parts that `model` lacks."""
    names = {official: ours for ours, official in _official_names(model).items()}
    lacking = tuple(
        prefix
        for prefix, part in (("rev_stack.recomp_op.", model.neck), ("head.", model.head))
        if part is None
    )
    return {
        names.get(name, name): tensor
        for name, tensor in weights.items()
        if name in names or not name.startswith(lacking)
    }


def to_official(model: RevBiFPN) -> dict[str, Tensor]:
    """Return the authors' name → the model's own tensor, no copy: a state_dict for their code."""
    ours = model.state_dict(keep_vars=True)
    return {official: ours[name] for name, official in _official_names(model).items()}


def load_checkpoint(model: RevBiFPN, path: str | Path) -> None:
    """Copy a file of weights, under our names or the authors', into `model`."""
    weights = _read("load_checkpoint", path)
    if any(name.startswith("rev_stack.") for name in weights):
        load_official(model, weights)
    else:
        _load("load_checkpoint", model, weights)


def _official_names(model: RevBiFPN) -> dict[str, str]:
    """Our name of each parameter and buffer → the authors'."""
    prefixes = dict(_prefixes(model))
    modules = {prefix: model.get_submodule(prefix[:-1]) for prefix in prefixes}
    names = {}
    for ours, official in prefixes.items():
        for name in modules[ours].state_dict():
            names[ours + name] = official + name
    return names


def _prefixes(model: RevBiFPN) -> Iterator[tuple[str, str]]:
    """Our prefix and theirs of everything that holds tensors."""
    for position, block in enumerate(model.body):
        ours, official = f"body.{position}.", f"rev_stack.{position + 1}."
        if isinstance(block, RevSilo):
            yield from _silo_prefixes(block, ours, official)
        elif isinstance(block, RevLevels):
            for level, coupling in enumerate(block.levels):
                assert isinstance(coupling, RevBlock)
                for half in ("f", "g"):
                    theirs = f"{official}rev_transform_{level}.{half}.xform_0_1."
                    mbconv = getattr(coupling, half)
                    yield from _mbconv_prefixes(mbconv, f"{ours}levels.{level}.{half}.", theirs)
    if model.neck is not None:
        for level, mbconv in enumerate(model.neck.levels):
            theirs = f"rev_stack.recomp_op.recomp_transform_{level}."
            yield from _mbconv_prefixes(mbconv, f"neck.levels.{level}.", theirs)
    if model.head is not None:
        for level, mbconv in enumerate(model.head.levels):
            theirs = f"head.pyramid_heads.{level}."
            yield from _mbconv_prefixes(mbconv, f"head.levels.{level}.", theirs)
        yield "head.final.", "head.final_conv."
        yield "classifier.", "head.fc."


def _silo_prefixes(silo: RevSilo, ours: str, official: str) -> Iterator[tuple[str, str]]:
    for key, mbconv in silo.down.items():
        yield from _mbconv_prefixes(mbconv, f"{ours}down.{key}.", f"{official}f.xform_{key}.")
    for key, mbconv in silo.up.items():
        a, b = (silo.levels - 1 - int(level) for level in key.split("_"))
        theirs = f"{official}g.xform_{a}_{b}.0."
        yield from _mbconv_prefixes(mbconv, f"{ours}up.{key}.", theirs)


def _mbconv_prefixes(mbconv: nn.Module, ours: str, official: str) -> Iterator[tuple[str, str]]:
    held = [name for name, _ in mbconv.named_modules()]
    for part, theirs in _PARTS.items():
        if part[:-1] in held:
            yield ours + part, official + theirs


def _read(op: str, path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a file, by name; nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{op}: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{op}: reading {path} needs `pip install safetensors`") from error
        read = load_file
    else:
        read = _read_pickle
    try:
        weights = read(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{op}: {path} holds more than tensors, or no checkpoint at all; nothing of it was "
            f"executed ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{op}: {path} is damaged or no checkpoint: {reason}") from error
    if isinstance(weights, Mapping) and isinstance(weights.get("state_dict"), Mapping):
        weights = weights["state_dict"]  # as training scripts save it
    if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(
            f"{op}: {path} must hold tensors by name, got {type(weights).__name__}"
            f"{' of ' + _few(weights) if isinstance(weights, Mapping) else ''}"
        )
    return weights


def _read_pickle(path: Path):
    return torch.load(path, map_location="cpu", weights_only=True)


def _load(op: str, model: RevBiFPN, weights: Mapping[str, Tensor]) -> None:
    """Load all of `weights` or, with an error, none."""
    own = model.state_dict()
    # Norms that do not count batches, such as frozen ones, take the same checkpoints.
    weights = {n: w for n, w in weights.items() if n in own or not n.endswith(COUNTER)}
    classifier = [name for name in own if name.startswith("classifier.")]
    other_classes = [
        name for name in classifier if name in weights and weights[name].shape != own[name].shape
    ]
    if other_classes and all(weights[n].shape[1:] == own[n].shape[1:] for n in other_classes):
        count = len(weights["classifier.bias"])
        warnings.warn(
            f"{op}: the classifier keeps its initialisation, because the checkpoint has {count} "
            f"classes and the model {model.num_classes}",
            stacklevel=4,
        )
        weights.update({name: own[name] for name in classifier})
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [n for n in own if n in weights and weights[n].shape != own[n].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"{op}: {_complaint(own, weights, missing, unexpected, shapes)}")
    model.load_state_dict(weights)


def _complaint(own, weights, missing, unexpected, shapes) -> str:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} of {len(own)} tensors, such as {missing[0]}")
    if unexpected:
        parts.append(f"has {len(unexpected)} that the model lacks, such as {unexpected[0]}")
    if shapes:
        name = shapes[0]
        expected, got = tuple(own[name].shape), tuple(weights[name].shape)
        parts.append(f"has {len(shapes)} of another shape: {name} expected {expected}, got {got}")
    return f"the checkpoint is not of this model: it {'; it '.join(parts)}{_size_hint(weights)}"


def _size_hint(weights: Mapping[str, Tensor]) -> str:
    """Which published size a checkpoint is of: their first widths differ."""
    first = weights.get("body.0.levels.0.f.depthwise.norm.weight")
    if first is None:
        return ""
    width = 2 * len(first)
    for name, config in SIZES.items():
        if config.widths[0] == width:
            return f"; it looks like {name}"
    return f"; its finest stream has {width} channels"


def _few(weights: Mapping) -> str:
    names = [str(name) for name in list(weights)[:3]]
    return f"{', '.join(names) or 'nothing'}{', …' if len(weights) > 3 else ''}"
