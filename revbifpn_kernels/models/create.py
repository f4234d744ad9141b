"""Models by name: `revbifpn_s0` … `revbifpn_s6`, `create_model`."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
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
        num_classes: 0 for a backbone, whose forward returns the pyramid, a list of maps. (Made by
            timm, a model with 0 classes keeps its head and returns the pooled features.)
        neck: False leaves out the neck: the pyramid is the streams of the body.
        reversible: False trains under plain autograd.
        checkpoint: A file of weights, ours or the authors', `torch.save`d or safetensors. A
            classifier of another number of classes is left at its initialisation, with a warning.
        overrides: Other fields of `Config`, such as in_chans, extra_silos, drop_rate, lattice.

    Raises:
        ValueError: The name or an override is unknown, a value is out of range, or the checkpoint
            is not of this model.
        TypeError: `checkpoint` is no path.
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


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    matches = difflib.get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else f"; expected one of {known}"


def _sized(name: str, costs: str) -> Callable[..., RevBiFPN]:
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
    build.__doc__ = f"Return a RevBiFPN-{name[-2:].upper()}: {costs}; arguments of `create_model`."
    return build


revbifpn_s0 = _sized("revbifpn_s0", "3.4 M parameters, 0.31 G MACs at 224 pixels")
revbifpn_s1 = _sized("revbifpn_s1", "5.1 M parameters, 0.62 G MACs at 256 pixels")
revbifpn_s2 = _sized("revbifpn_s2", "10.6 M parameters, 1.37 G MACs at 256 pixels")
revbifpn_s3 = _sized("revbifpn_s3", "19.6 M parameters, 3.33 G MACs at 288 pixels")
revbifpn_s4 = _sized("revbifpn_s4", "48.7 M parameters, 10.6 G MACs at 320 pixels")
revbifpn_s5 = _sized("revbifpn_s5", "82.0 M parameters, 21.8 G MACs at 352 pixels")
revbifpn_s6 = _sized("revbifpn_s6", "142.3 M parameters, 38.1 G MACs at 352 pixels")
