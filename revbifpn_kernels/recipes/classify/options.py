"""Options of `train`, and defaults that depend on the data."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..run import options as run
from ..run.errors import RunError
from ..run.networks import THREE_LEVELS
from ..run.options import BELOW_1, FROM_0, FROM_1, NOT_NEGATIVE, by_data, changeable, option

DIGITS_NETWORK = (
    *THREE_LEVELS,
    ("in_chans", 1),
    ("resolution", 32),
    ("features", 256),
    ("extra_silos", 1),
    ("drop_rate", 0.1),
)


@dataclass(frozen=True)
class Options(run.RunOptions):
    """The options of a training. None: a default that depends on the data."""

    DATA = ("digits", "folder")

    # A moved folder is the same data: names and labels are compared.
    data: str | None = changeable(
        None,
        "folder with train/ and val/ (and test/), or with a folder for each class, which is split "
        "80:10:10; without it, scikit-learn's handwritten digits",
    )
    split_seed: int = option(0, "seed of the split of digits or of an unsplit folder", FROM_0)
    model: str | None = option(
        None, "revbifpn_s0 (default; with three levels for digits) … revbifpn_s6"
    )
    settings: tuple = run.settings_of(DIGITS_NETWORK)
    norm: str = option(
        "batch",
        "batch norm or group norm (group: independent of --accumulate and of processes)",
        choices=("batch", "group"),
    )
    image_size: int | None = option(
        None, "side in pixels, the model's unless given", run.whole_from(32)
    )
    new_head: bool = option(
        False, "a new classifier, even if that of --checkpoint has as many classes"
    )
    freeze: tuple = option(
        (), "parts that are not trained: stem,body.0,body,neck,head", type=run.names
    )
    batch_size: int | None = by_data(64, 256, "images per step, over all processes", FROM_1)
    epochs: int | None = by_data(25, 300, "passes over the images; 0: no training", FROM_0)
    accumulate: int = option(1, "micro-batches per step, whose gradients are added up", FROM_1)
    opt: str = option("adamw", "an optimizer of timm's: adamw, sgd, lamb, …")
    lr: float | None = by_data(4e-3, 1e-3, "learning rate after the warm-up", run.POSITIVE)
    min_lr: float = option(1e-5, "learning rate at the end, after a cosine", NOT_NEGATIVE)
    warmup_epochs: float | None = by_data(
        2, 5, "epochs of learning-rate warm-up; a fifth of --epochs if that is less", NOT_NEGATIVE
    )
    weight_decay: float | None = by_data(
        0.02, 0.05, "weight decay, not of biases and norms", NOT_NEGATIVE
    )
    clip_grad: float = option(5.0, "maximum norm of the gradient; 0: no clipping", NOT_NEGATIVE)
    label_smoothing: float = option(0.1, "share of the target spread over all classes", BELOW_1)
    drop: float | None = option(None, "probability of dropout before the classifier", BELOW_1)
    drop_path: float | None = option(
        None, "stochastic depth: probability in the last silo", BELOW_1
    )
    ema_decay: float | None = by_data(
        0.99,
        0.9999,
        "decay of the weights' moving average, which is tested and saved; 0: no average",
        BELOW_1,
    )
    augment: str | None = by_data(
        "affine",
        "crop",
        "crop: crop and flip; rand, trivial: these with RandAugment, TrivialAugment",
        choices=("none", "affine", "crop", "rand", "trivial"),
    )
    erasing: float = option(0.0, "probability that a rectangle is erased", run.PROBABILITY)
    mixup: float = option(0.0, "alpha of MixUp, 0: none", NOT_NEGATIVE)
    cutmix: float = option(0.0, "alpha of CutMix, 0: none", NOT_NEGATIVE)
    seed: int = option(0, "seed of weights, order, augmentation and dropout", FROM_0)
    amp: str = option("none", "dtype of autocast", choices=("none", "bfloat16", "float16"))
    channels_last: bool = option(False, "channels_last memory format for images and weights")
    compile: str | None = option(
        None,
        "torch.compile by this backend, inductor unless named: transforms, or a stored network",
        nargs="?",
        const="inductor",
    )
    cuda_graph: bool = option(False, "launch each step as one CUDA graph, if it can be one")
    fsdp: bool = changeable(False, "shard by FSDP2 under torchrun, instead of DDP")
    threads: int | None = changeable(
        None, "CPU threads per process; 1 for digits, else PyTorch's choice", FROM_1
    )
    workers: int | None = changeable(
        None, "processes that load images; one fewer than the cores, at most 8", FROM_0
    )
    tensorboard: bool = changeable(True, "write TensorBoard's events")
    export: str | None = changeable(None, "folder for the result as ONNX and torch.export")
    memory: bool = changeable(False, "print a step's memory, reversible and stored, and stop")


FIELDS = run.fields_of(Options)


def parse(arguments: Sequence[str] | None = None) -> Options:
    about = "Train a RevBiFPN: on images in folders, or on handwritten digits."
    return completed(run.parsed("train", about, Options, arguments))


def completed(options: Options) -> Options:
    """Replaces None by the data's defaults; raises for values out of range."""
    found = run.defaults_of(options)
    if options.warmup_epochs is None:  # a short run has to reach its learning rate, too
        epochs = found.get("epochs", options.epochs)
        found["warmup_epochs"] = min(found["warmup_epochs"], epochs / 5)
    if options.threads is None and options.data is None:
        found["threads"] = 1  # with such small images, two are not faster
    if options.workers is None:
        found["workers"] = min(8, max(1, len(os.sched_getaffinity(0)) - 1))
    options = dataclasses.replace(options, **found)
    run.check(options)
    if options.batch_size % options.accumulate:
        raise RunError(
            f"--accumulate must divide --batch-size {options.batch_size}, got {options.accumulate}"
        )
    if options.cuda_graph and options.accumulate > 1:
        raise RunError(f"--cuda-graph needs --accumulate 1, got {options.accumulate}")
    return options
