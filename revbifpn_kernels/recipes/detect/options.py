"""Options of `detect`, and defaults that depend on the data."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...models.sizes import SIZES
from ..run import options as run
from ..run.errors import RunError
from ..run.networks import THREE_LEVELS
from ..run.options import FROM_0, FROM_1, NOT_NEGATIVE, by_data, changeable, option, switch

MOST_DRAWN = 100  # images of a figure, which then takes seconds to draw
DRAWN = run.Range(lambda v: 0 <= v <= MOST_DRAWN, f"a whole number from 0 to {MOST_DRAWN}")


@dataclass(frozen=True)
class Options(run.RunOptions):
    """The options of a detector. None: a default that depends on the data."""

    DATA = ("digits", "coco")

    data: str | None = option(
        None,
        "folder with images/ and COCO annotations train.json and val.json; without it, "
        "scikit-learn's handwritten digits on its two photographs",
    )
    masks: bool = option(False, "Mask R-CNN, instead of Faster R-CNN")
    model: str | None = option(
        None,
        "the backbone; revbifpn_s0 unless given, with three levels for digits",
        choices=tuple(SIZES),
    )
    settings: tuple = run.settings_of((*THREE_LEVELS, ("extra_silos", 0)))
    freeze: tuple = option(
        (), "parts of the model that are not trained: stem,body.0,body,neck", type=run.names
    )
    out_channels: int | None = by_data(
        64, 256, "channels of the maps that the detector sees", FROM_1
    )
    image_size: int | None = by_data(128, 512, "longest side in pixels", run.whole_from(64))
    epochs: int | None = by_data(8, 24, "passes over the images; 0: no training", FROM_0)
    minutes: float = option(
        0.0,
        "most minutes of training, at whose end the learning rate is 0; 0: no limit",
        NOT_NEGATIVE,
    )
    # Batch norm needs two values per channel, and the coarsest map may have a single pixel.
    batch_size: int | None = by_data(8, 16, "images per step", run.whole_from(2))
    lr: float | None = by_data(
        3e-3, 1e-3, "AdamW's learning rate, falls as a cosine to 0", run.POSITIVE
    )
    warmup_steps: int | None = by_data(100, 500, "steps of learning-rate warm-up", FROM_0)
    weight_decay: float = option(0.05, "weight decay, not of biases and norms", NOT_NEGATIVE)
    clip_grad: float = option(10.0, "maximum norm of the gradient; 0: no clipping", NOT_NEGATIVE)
    flip: float | None = by_data(0.0, 0.5, "probability of a mirror image", run.PROBABILITY)
    seed: int = option(0, "seed of weights, order, scenes and proposals", FROM_0)
    train_images: int | None = by_data(
        1000, None, "scenes per epoch of digits, new ones each time", FROM_1
    )
    val_images: int | None = by_data(300, None, "scenes of other digits to measure on", FROM_1)
    amp: str = option("none", "dtype of autocast", choices=("none", "bfloat16"))
    threads: int | None = changeable(
        None, "CPU threads; 2 for digits, else PyTorch's choice", FROM_1
    )
    workers: int = changeable(0, "processes that load images", FROM_0)
    eval_every: int = changeable(
        0, "epochs between evaluations; 0: only after the training", FROM_0
    )
    draw: int = changeable(12, f"images of predictions.png, at most {MOST_DRAWN}", DRAWN)
    write: str | None = changeable(
        None, "write the digits to this new folder, as --data reads them, and stop"
    )
    memory: bool = changeable(
        False, "print the memory of backbones at --image-size, 512 unless given, and stop"
    )

    @property
    def dataset(self) -> str:
        """The name of the data that sets the defaults; --memory has those of COCO."""
        return "coco" if self.memory else super().dataset

    def fixed_on_resume(self) -> dict[str, Any]:
        """As the base class, but by the switches' names."""
        saved = super().fixed_on_resume()
        settings = {f"--set {name}": value for name, value in saved.pop("settings")}
        return {switch(name): value for name, value in saved.items()} | settings


def parse(arguments: Sequence[str] | None = None) -> Options:
    about = "Train a detector on a RevBiFPN: on COCO annotations, or on digits."
    return completed(run.parsed("detect", about, Options, arguments))


def completed(options: Options) -> Options:
    """Replaces None by the data's defaults; raises for values out of range."""
    found = run.defaults_of(options)
    if options.threads is None and options.dataset == "digits":
        found["threads"] = min(2, len(os.sched_getaffinity(0)))  # more threads wait for each other
    options = dataclasses.replace(options, **found)
    run.check(options)
    if options.write is not None and options.data is not None:
        raise RunError("--write writes the digits, and goes without --data; got both")
    for name in ("train_images", "val_images"):
        if options.data is not None and getattr(options, name) is not None:
            raise RunError(
                f"{switch(name)} counts scenes of digits, and goes without --data; got both"
            )
    return options
