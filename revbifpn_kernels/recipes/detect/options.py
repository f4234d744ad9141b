"""What can be asked for on the command line."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...models.sizes import SIZES
from ..classify.options import (
    THREE_LEVELS,
    WHOLE,
    Rules,
    TrainError,
    check_rules,
    flag,
    missing,
    names,
    option,
    parser_of,
    power,
    setting,
    switch,
)

MOST_DRAWN = 100  # images of a picture, which takes seconds then


class DetectError(TrainError):
    """What a user can mend: the command prints the message alone, without a traceback."""

    command = "detect"


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
class Options:
    """Answers to everything that the command asks. None: by the data, see `PRESETS`."""

    data: str | None = option(
        None,
        "folder with images/ and COCO annotations train.json and val.json; without it, "
        "scikit-learn's handwritten digits on its two photographs",
    )
    masks: bool = flag(False, "Mask R-CNN, instead of Faster R-CNN")
    model: str | None = option(
        None,
        "its backbone; revbifpn_s0 unless given, for digits of three levels",
        choices=tuple(SIZES),
    )
    settings: tuple = option(
        None,
        "a number of the backbone, a field of Config, such as extra_silos=1; may be repeated",
        setting,
        action="append",
    )
    checkpoint: str | None = option(
        None, "file of the backbone's weights to start from: ours, official, safetensors"
    )
    freeze: tuple = option((), "its parts that stay as they are: stem,body.0,body,neck", names)
    lattice: float | None = option(None, "its exact mode, such as 2^-12", power)
    out_channels: int | None = option(None, "of the maps that the detector sees", int)
    image_size: int | None = option(None, "longest side in pixels", int)
    epochs: int | None = option(None, "times that each image is seen; 0 trains nothing", int)
    minutes: float = option(
        0.0,
        "of training, measuring not counted: end by then, with the learning rate at 0; 0: no limit",
        float,
    )
    batch_size: int | None = option(None, "images of a step", int)
    lr: float | None = option(None, "AdamW's learning rate, falls as a cosine to 0", float)
    warmup_steps: int | None = option(None, "in which the learning rate rises", int)
    weight_decay: float = option(0.05, "not on biases and norms", float)
    clip_grad: float = option(10.0, "longest gradient of all parameters; 0: any", float)
    flip: float | None = option(None, "probability of a mirror image", float)
    seed: int = option(0, "of weights, order, scenes, proposals", int)
    train_images: int | None = option(None, "scenes of an epoch of digits, new ones each time", int)
    val_images: int | None = option(None, "scenes of other digits to measure on", int)
    reversible: bool = flag(True, "recompute activations, or store them")
    amp: str = option("none", "autocast", choices=("none", "bfloat16"))
    device: str = option("auto", "a GPU if there is one", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        None, "of the CPU; 2 for digits, else PyTorch's choice", int, is_free=True
    )
    workers: int = option(0, "processes that load images", int, is_free=True)
    out: str | None = option(None, "folder of the run; runs/NAME-TIME unless given", is_free=True)
    resume: str = option(
        "never",
        "auto continues the run in --out if there is one",
        is_free=True,
        choices=("never", "auto"),
    )
    checkpoint_minutes: float = option(
        5.0, "between checkpoints; 0: after each step", float, is_free=True
    )
    eval_every: int = option(
        0, "epochs between evaluations; 0: only one, of the result", int, is_free=True
    )
    log_every: int = option(10, "steps between rows of steps.csv", int, is_free=True)
    draw: int = option(12, f"images of predictions.png, at most {MOST_DRAWN}", int, is_free=True)
    progress: bool = flag(True, "a progress bar on terminals", is_free=True)
    write: str | None = option(
        None, "write the digits to this new folder, as --data reads them, and stop", is_free=True
    )
    memory: bool = flag(
        False, "count what backbones hold at --image-size, 512 unless given, and stop", is_free=True
    )

    @property
    def dataset(self) -> str:
        """Whose defaults hold; memory is counted of the sizes that people train."""
        return "digits" if self.data is None and not self.memory else "coco"


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def parse(arguments: Sequence[str] | None = None) -> Options:
    about = "Train a detector on a RevBiFPN: on COCO annotations, or on digits."
    parser = parser_of("detect", about, FIELDS, PRESETS)
    return completed(Options(**vars(parser.parse_args(arguments))))


def completed(options: Options) -> Options:
    """With the data's defaults in place of None; raises for what is out of range."""
    preset = PRESETS[options.dataset]
    found = missing(options, preset)
    if options.threads is None and options.dataset == "digits":
        found["threads"] = min(2, len(os.sched_getaffinity(0)))  # more wait for each other
    options = dataclasses.replace(options, **found)
    _check(options)
    return options


_RULES: Rules = (
    ("epochs seed workers warmup_steps eval_every", lambda v: v >= 0, WHOLE.format(0)),
    ("draw", lambda v: 0 <= v <= MOST_DRAWN, f"a whole number from 0 to {MOST_DRAWN}"),
    ("log_every out_channels", lambda v: v >= 1, WHOLE.format(1)),
    # Batch norm needs two values of each channel, and the coarsest map may have a single pixel.
    ("batch_size", lambda v: v >= 2, WHOLE.format(2)),
    ("image_size", lambda v: v >= 64, WHOLE.format(64)),
    ("threads train_images val_images", lambda v: v is None or v >= 1, WHOLE.format(1)),
    ("lr", lambda v: 0 < v < math.inf, "a positive number"),
    (
        "minutes weight_decay clip_grad checkpoint_minutes",
        lambda v: 0 <= v < math.inf,
        "a number from 0 on",
    ),
    ("flip", lambda v: 0 <= v <= 1, "in [0, 1]"),
)


def _check(options: Options) -> None:
    check_rules(options, _RULES, DetectError)
    if options.resume == "auto" and not options.out:
        raise DetectError("detect: --resume auto needs --out, the folder of the run; got none")
    if options.write is not None and options.data is not None:
        raise DetectError("detect: --write writes the digits, and goes without --data; got both")
    for name in ("train_images", "val_images"):
        if options.data is not None and getattr(options, name) is not None:
            raise DetectError(
                f"detect: {switch(name)} counts scenes of digits, and goes without --data; got both"
            )


def saved(options: Options) -> dict[str, Any]:
    """What a checkpoint keeps of them: all that changes the numbers of a run."""
    kept = {
        switch(name): getattr(options, name)
        for name, field in FIELDS.items()
        if not field.metadata["is_free"] and name != "settings"
    }
    return kept | {f"--set {name}": value for name, value in options.settings}
