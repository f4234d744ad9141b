"""The published checkpoints: the authors' names for our tensors.

Position n of the authors' stack is block n − 1 of `body`: their position 0 is the stem. In the up
half of a silo with L levels they count levels from the coarsest, so that their edge (a, b) is our
(L − 1 − a, L − 1 − b).
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .revbifpn import RevBiFPN

_MBCONV = {  # the parts of an MBConv, ours and theirs
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
    """`weights`, named by us or by the authors, under our names, without parts `model` lacks."""
    names: dict[str, str] = {}
    if is_theirs := is_official(weights):
        names = {theirs: ours for ours, theirs in _official_names(model).items()}
    # A model without classes has an identity in place of the classifier.
    classifier = None if isinstance(model.classifier, nn.Identity) else model.classifier
    prefixes = (
        (model.neck, "neck.", "rev_stack.recomp_op."),
        (model.head, "head.", "head."),
        (classifier, "classifier.", "head.fc."),
    )
    lacking = tuple(
        theirs if is_theirs else ours for part, ours, theirs in prefixes if part is None
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


def _official_names(model: RevBiFPN) -> dict[str, str]:
    """Our name of each parameter and buffer → the authors'."""
    names = ((name, _official_name(model, name)) for name in model.state_dict())
    return {ours: theirs for ours, theirs in names if theirs is not None}


def _official_name(model: RevBiFPN, name: str) -> str | None:
    """The authors' name of our tensor; None if their network does not have it."""
    match name.split("."):
        case ["body", n, "levels", level, half, *rest]:
            place = f"rev_stack.{int(n) + 1}.rev_transform_{level}.{half}.xform_0_1"
        case ["body", n, "down", edge, *rest]:
            place = f"rev_stack.{int(n) + 1}.f.xform_{edge}"
        case ["body", n, "up", edge, *rest]:
            coarsest = model.body[int(n)].levels - 1
            a, b = (coarsest - int(level) for level in edge.split("_"))
            place = f"rev_stack.{int(n) + 1}.g.xform_{a}_{b}.0"
        case ["neck", "levels", level, *rest]:
            place = f"rev_stack.recomp_op.recomp_transform_{level}"
        case ["head", "levels", level, *rest]:
            place = f"head.pyramid_heads.{level}"
        case ["head", "final", *rest]:
            return ".".join(["head.final_conv", *rest])
        case ["classifier", *rest]:
            return ".".join(["head.fc", *rest])
        case _:
            return None
    tail = ".".join(rest)
    parts = ((ours, theirs) for ours, theirs in _MBCONV.items() if tail.startswith(ours))
    return next((f"{place}.{theirs}{tail.removeprefix(ours)}" for ours, theirs in parts), None)
