"""The published checkpoints: the authors' names for our tensors.

Position n of the authors' stack is block n − 1 of `body`: their position 0 is the stem. Of a silo
of L levels their `g` counts levels from the coarsest, so their up edge (a, b) is
our (L − 1 − a, L − 1 − b).
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from ..blocks import RevBlock, RevLevels
from ..silo import RevSilo
from .revbifpn import RevBiFPN

_PARTS = {  # of an MBConv, ours and theirs
    "expand.": "exp_conv.",
    "depthwise.": "dw_conv.",
    "squeeze_excite.reduce.": "se.se.1.",
    "squeeze_excite.expand.": "se.se.3.",
    "project.": "project_conv.",
}


def is_official(names: Iterable[str]) -> bool:
    """Whether a checkpoint has the authors' names."""
    return any(name.startswith("rev_stack.") for name in names)


def translated(model: RevBiFPN, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under our names, whoever's they have, without the parts that `model` lacks."""
    names: dict[str, str] = {}
    parts = {"neck.": model.neck, "head.": model.head, "classifier.": _linear(model)}
    if is_official(weights):
        names = {official: ours for ours, official in _official_names(model).items()}
        parts = {
            "rev_stack.recomp_op.": model.neck,
            "head.": model.head,
            "head.fc.": _linear(model),
        }
    lacking = tuple(prefix for prefix, part in parts.items() if part is None)
    return {
        names.get(name, name): tensor
        for name, tensor in weights.items()
        if name in names or not name.startswith(lacking)
    }


def _linear(model: RevBiFPN) -> nn.Module | None:
    """The classifier, if it is one: without classes it is an identity."""
    return None if isinstance(model.classifier, nn.Identity) else model.classifier


def to_official(model: RevBiFPN) -> dict[str, Tensor]:
    """Return the authors' name → the model's own tensor, no copy: a state_dict for their code."""
    ours = model.state_dict(keep_vars=True)
    return {official: ours[name] for name, official in _official_names(model).items()}


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
