"""Options of the command, and defaults that depend on the data."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...models.sizes import SIZES
from ..run.errors import RunError
from ..run.networks import THREE_LEVELS
from ..run.options import (
    FROM_0,
    PROBABILITY,
    Range,
    RunOptions,
    check,
    free,
    missing,
    names,
    option,
    parsed,
    switch,
    whole_from,
)

MOST_DRAWN = 100  # images of a figure; more take minutes
DRAWN = Range(lambda v: 0 <= v <= MOST_DRAWN, f"a whole number from 0 to {MOST_DRAWN}")


class Preset(NamedTuple):
    """Defaults that depend on the data."""

    image_size: int
    epochs: int
    batch_size: int
    lr: float
    warmup_steps: int
    out_channels: int
    flip: float
    train_images: int | None
    val_images: int | None
    settings: tuple[tuple[str, Any], ...]


PRESETS = {
    "digits": Preset(128, 8, 8, 3e-3, 100, 64, 0.0, 1000, 300, (*THREE_LEVELS, ("extra_silos", 0))),
    "coco": Preset(512, 24, 16, 1e-3, 500, 256, 0.5, None, None, ()),
}


@dataclass(frozen=True)
class Options(RunOptions):
    """The options of a detector. None: a default that depends on the data, see `PRESETS`."""

    data: str | None = option(
        None,
        "folder with images/ and COCO annotations train.json and val.json; without it, "
        "scikit-learn's handwritten digits on its two photographs",
    )
    masks: bool = option(False, "Mask R-CNN, instead of Faster R-CNN")
    model: str | None = option(
        None,
        "the backbone; revbifpn_s0 unless given, for digits of three levels",
        choices=tuple(SIZES),
    )
    freeze: tuple = option(
        (), "parts of the model that stay as they are: stem,body.0,body,neck", type=names
    )
    out_channels: int | None = option(None, "of the maps that the detector sees", whole_from(1))
    image_size: int | None = option(None, "longest side in pixels", whole_from(64))
    minutes: float = option(
        0.0,
        "of training, without evaluations: end by then, with the learning rate at 0; 0: no limit",
        FROM_0,
    )
    # Batch norm needs two values per channel, and the coarsest map may have a single pixel.
    batch_size: int | None = option(None, "images per step", whole_from(2))
    warmup_steps: int | None = option(None, "in which the learning rate rises", whole_from(0))
    weight_decay: float = option(0.05, "not of biases and norms", FROM_0)
    clip_grad: float = option(10.0, "longest gradient of all parameters; 0: any", FROM_0)
    flip: float | None = option(None, "probability of a mirror image", PROBABILITY)
    seed: int = option(0, "of weights, order, scenes and proposals", whole_from(0))
    train_images: int | None = option(
        None, "scenes per epoch of digits, new ones each time", whole_from(1)
    )
    val_images: int | None = option(None, "scenes of other digits to measure on", whole_from(1))
    amp: str = option("none", "autocast", choices=("none", "bfloat16"))
    threads: int | None = free(
        None, "of the CPU; 2 for digits, else PyTorch's choice", whole_from(1)
    )
    workers: int = free(0, "processes that load images", whole_from(0))
    eval_every: int = free(
        0, "epochs between evaluations; 0: only one, of the result", whole_from(0)
    )
    draw: int = free(12, f"images of predictions.png, at most {MOST_DRAWN}", DRAWN)
    write: str | None = free(
        None, "write the digits to this new folder, as --data reads them, and stop"
    )
    memory: bool = free(
        False, "count what backbones hold at --image-size, 512 unless given, and stop"
    )

    @property
    def dataset(self) -> str:
        """The preset's name; --memory counts the sizes that people train."""
        return "digits" if self.data is None and not self.memory else "coco"

    def saved(self) -> dict[str, Any]:
        """As the base class, by the switches' names."""
        saved = super().saved()
        settings = {f"--set {name}": value for name, value in saved.pop("settings")}
        return {switch(name): value for name, value in saved.items()} | settings


def parse(arguments: Sequence[str] | None = None) -> Options:
    about = "Train a detector on a RevBiFPN: on COCO annotations, or on digits."
    return completed(parsed("detect", about, Options, PRESETS, arguments))


def completed(options: Options) -> Options:
    """Replaces None by the data's defaults; raises for what is out of range."""
    found = missing(options, PRESETS[options.dataset])
    if options.threads is None and options.dataset == "digits":
        found["threads"] = min(2, len(os.sched_getaffinity(0)))  # more wait for each other
    options = dataclasses.replace(options, **found)
    check(options)
    if options.write is not None and options.data is not None:
        raise RunError("--write writes the digits, and goes without --data; got both")
    for name in ("train_images", "val_images"):
        if options.data is not None and getattr(options, name) is not None:
            raise RunError(
                f"{switch(name)} counts scenes of digits, and goes without --data; got both"
            )
    return options
