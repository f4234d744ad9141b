"""Models by name: `revbifpn_s0` … `revbifpn_s6`, `create_model`."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .checkpoints import load_checkpoint
from .revbifpn import RevBiFPN
from .sizes import FIELDS, SIZES, Config


def create_model(
    name: str,
    num_classes: int = 1000,
    neck: bool = True,
    reversible: bool = True,
    checkpoint: str | Path | None = None,
    **overrides: Any,
) -> RevBiFPN:
    """Return a RevBiFPN of a published size.

    Args:
        name: "revbifpn_s0" … "revbifpn_s6".
        num_classes: 0 for a backbone, whose forward returns the pyramid, a list of maps. (A model
            that timm creates with 0 classes keeps its head and returns the pooled features.)
        neck: False leaves out the neck: the pyramid is the streams of the body.
        reversible: False trains under plain autograd.
        checkpoint: A file of weights, ours or the authors', `torch.save`d or safetensors. A
            classifier of another number of classes keeps its initialisation, with a warning.
        overrides: Other fields of `Config`, such as in_chans, extra_silos, drop_rate, lattice.

    Raises:
        ValueError: The name or an override is unknown, a value is out of range, or the checkpoint
            is not of this model.
        TypeError: `checkpoint` is not a path.
    """
    if not isinstance(checkpoint, str | Path | None):
        got = type(checkpoint).__name__
        raise TypeError(f"create_model: checkpoint must be a path or None, got {got}")
    config = config_of(name, num_classes, neck, overrides)
    model = RevBiFPN(config, reversible=reversible)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def config_of(name: str, num_classes: int, neck: bool, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a published size with changes; unknown names raise."""
    if not isinstance(name, str) or name not in SIZES:
        raise ValueError(f"create_model: no model is called {name!r}{_nearest(name, SIZES)}")
    for override in overrides:
        if override not in FIELDS:
            hint = _nearest(override, FIELDS)
            raise ValueError(f"{name}: no setting is called {override!r}{hint}")
    return dataclasses.replace(SIZES[name], num_classes=num_classes, neck=neck, **overrides)


def _nearest(word: str, known: Collection[str]) -> str:
    matches = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; expected one of {list(known)}"


def _sized(name: str) -> Callable[..., RevBiFPN]:
    """The constructor of a published size."""

    def build(
        num_classes: int = 1000,
        neck: bool = True,
        reversible: bool = True,
        checkpoint: str | Path | None = None,
        **overrides: Any,
    ) -> RevBiFPN:
        return create_model(name, num_classes, neck, reversible, checkpoint, **overrides)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Return a RevBiFPN-{name[-2:].upper()}; see `create_model` and `SIZES`."
    return build


revbifpn_s0, revbifpn_s1, revbifpn_s2, revbifpn_s3, revbifpn_s4, revbifpn_s5, revbifpn_s6 = map(
    _sized, SIZES
)
