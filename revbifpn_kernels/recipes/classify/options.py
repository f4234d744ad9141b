"""What can be asked for on the command line, and what may change when a run is resumed."""

import argparse
import ast
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class TrainError(Exception):
    """What a user can mend: the command prints the message alone, without a traceback."""

    command = "train"

    def __init__(self, message: str) -> None:
        # From a process that loads images it comes with a traceback before it.
        wrapped = message.startswith("Caught ") and f"{type(self).__name__}: "
        super().__init__(message.rpartition(wrapped)[2].strip() if wrapped else message)


def option(default, help: str, kind: Callable = str, *, is_free: bool = False, **argument):
    """A field of `Options`. Free ones may change when a run is resumed: its numbers stay."""
    metadata = {"help": help, "kind": kind, "is_free": is_free, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


def flag(default: bool, help: str, *, is_free: bool = False):
    return option(default, help, is_free=is_free, action=argparse.BooleanOptionalAction)


def power(text: str) -> float:
    """ "2^-12", "2**-12" or "0.000244140625"."""
    base, _, exponent = text.replace("**", "^").partition("^")
    try:
        return float(base) ** int(exponent) if exponent else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 2^-12, got {text!r}") from None


def setting(text: str) -> tuple[str, Any]:
    """ "widths=48,64,80,160" → ("widths", (48, 64, 80, 160))."""
    name, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return name.strip().replace("-", "_"), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"expected NAME=NUMBERS, such as widths=48,64,80,160, got {text!r}"
        ) from None


METAVARS = {int: "N", float: "X", setting: "NAME=VALUE"}  # what help shows in place of an answer


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class Preset(NamedTuple):
    """Defaults that depend on the data."""

    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float
    weight_decay: float
    ema_decay: float
    label_smoothing: float
    augment: str
    settings: tuple[tuple[str, Any], ...]


# RevBiFPN-S0 without its coarsest level, which would have few pixels of small images.
THREE_LEVELS = (
    ("widths", (48, 64, 80)),
    ("neck_widths", (48, 64, 128)),
    ("kernels", (3, 5, 5)),
    ("extra_kernels", (0, 0, 0)),
    ("expand_ratios", (1, 1, 2)),
    ("se_ratios", (0.25, 0.25, 0.125)),
    ("neck_expand_ratios", (1, 2, 2)),
    ("neck_se_ratios", (0.25, 0.25, 0.125)),
)
DIGITS_NETWORK = (
    *THREE_LEVELS,
    ("in_chans", 1),
    ("resolution", 32),
    ("features", 256),
    ("extra_silos", 1),
    ("drop_rate", 0.1),
)
PRESETS = {
    "digits": Preset(25, 64, 4e-3, 2, 0.02, 0.99, 0.1, "affine", DIGITS_NETWORK),
    "folder": Preset(300, 256, 1e-3, 5, 0.05, 0.9999, 0.1, "crop", ()),
}


@dataclass(frozen=True)
class Options:
    """Answers to everything that the command asks. None: by the data, see `PRESETS`."""

    data: str | None = option(
        None,
        "folder with train/ and val/ (and test/), or with a folder for each class, which is split "
        "80:10:10; without it, scikit-learn's handwritten digits",
        is_free=True,  # a moved folder is the same: names and labels are compared
    )
    split_seed: int = option(0, "of the split of digits and of undivided folders", int)
    out: str | None = option(None, "folder of the run; runs/NAME-TIME unless given", is_free=True)
    resume: str = option(
        "never",
        "auto continues the run in --out if there is one",
        is_free=True,
        choices=("never", "auto"),
    )
    model: str | None = option(
        None, "revbifpn_s0 … revbifpn_s6; S0 unless given, for digits of three levels"
    )
    settings: tuple = option(
        None,
        "a number of the model, a field of Config, such as extra_silos=1; may be repeated",
        setting,
        action="append",
    )
    norm: str = option(
        "batch", "group does not depend on how a batch is split", choices=("batch", "group")
    )
    image_size: int | None = option(None, "side in pixels, the model's unless given", int)
    checkpoint: str | None = option(
        None, "file of weights to start from: ours, official, safetensors"
    )
    new_head: bool = flag(False, "a new classifier, also if --checkpoint has as many classes")
    freeze: tuple = option((), "parts that stay as they are: stem,body.0,body,neck,head", names)
    epochs: int | None = option(None, "times that each image is seen; 0 trains nothing", int)
    batch_size: int | None = option(None, "images of a step, over all processes and parts", int)
    accumulate: int = option(1, "parts that a step's images are processed in", int)
    opt: str = option("adamw", "an optimizer of timm's: adamw, sgd, lamb, …")
    lr: float | None = option(None, "learning rate after the warm-up, falls as a cosine", float)
    min_lr: float = option(1e-5, "learning rate at the end", float)
    warmup_epochs: float | None = option(
        None, "in which the learning rate rises; a fifth of --epochs if that is less", float
    )
    weight_decay: float | None = option(None, "not on biases and norms", float)
    clip_grad: float = option(5.0, "longest gradient of all parameters; 0: any", float)
    label_smoothing: float | None = option(None, "share of the target spread over classes", float)
    drop: float | None = option(None, "dropout before the classifier", float)
    drop_path: float | None = option(None, "stochastic depth of the last silo", float)
    ema_decay: float | None = option(
        None, "of the averaged weights, which are the result; 0: none", float
    )
    augment: str | None = option(
        None,
        "none; affine; crop and flip; these with RandAugment or TrivialAugment",
        choices=("none", "affine", "crop", "rand", "trivial"),
    )
    erasing: float = option(0.0, "probability that a rectangle is erased", float)
    mixup: float = option(0.0, "alpha of MixUp, 0: none", float)
    cutmix: float = option(0.0, "alpha of CutMix, 0: none", float)
    seed: int = option(0, "of weights, order, augmentation, dropout", int)
    reversible: bool = flag(True, "recompute activations, or store them")
    lattice: float | None = option(None, "exact mode, such as 2^-12", power)
    amp: str = option("none", "autocast", choices=("none", "bfloat16", "float16"))
    channels_last: bool = flag(False, "memory format of images and weights")
    compile: str | None = option(
        None,
        "compile by this backend, inductor unless named: transforms, or the network if stored",
        nargs="?",
        const="inductor",
    )
    fsdp: bool = flag(False, "shard by FSDP2, under torchrun; DDP otherwise", is_free=True)
    device: str = option("auto", "a GPU if there is one", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(
        None, "of the CPU, for each process; 1 for digits, else PyTorch's choice", int, is_free=True
    )
    workers: int | None = option(
        None, "processes that load images; one less than the cores, at most 8", int, is_free=True
    )
    checkpoint_minutes: float = option(
        5.0, "between checkpoints; 0: after each step", float, is_free=True
    )
    log_every: int = option(10, "steps between rows of steps.csv", int, is_free=True)
    progress: bool = flag(True, "a progress bar on terminals", is_free=True)
    tensorboard: bool = flag(True, "write TensorBoard's events", is_free=True)
    export: str | None = option(
        None, "folder for ONNX and torch.export of the result", is_free=True
    )
    memory: bool = flag(False, "count a step's memory, beside stored, and stop", is_free=True)

    @property
    def dataset(self) -> str:
        return "digits" if self.data is None else "folder"


FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def switch(name: str) -> str:
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


def parse(arguments: Sequence[str] | None = None) -> Options:
    about = "Train a RevBiFPN: on pictures in folders, or on handwritten digits."
    parser = parser_of("train", about, FIELDS, PRESETS)
    return completed(Options(**vars(parser.parse_args(arguments))))


def parser_of(
    command: str,
    description: str,
    fields: dict[str, dataclasses.Field],
    presets: dict[str, NamedTuple],
) -> argparse.ArgumentParser:
    """A switch for each field that `option` or `flag` made."""
    parser = argparse.ArgumentParser(
        prog=f"python -m revbifpn_kernels.{command}",
        usage="%(prog)s [options], all of which --help explains",
        description=description,
    )
    for name, field in fields.items():
        argument = dict(field.metadata["argument"])
        if "action" not in argument or argument["action"] == "append":
            argument["type"] = field.metadata["kind"]
            argument.setdefault("metavar", METAVARS.get(field.metadata["kind"]))
        text = field.metadata["help"] + _shown_default(name, field.default, presets)
        parser.add_argument(switch(name), dest=name, default=field.default, help=text, **argument)
    return parser


def _shown_default(name: str, default: Any, presets: dict[str, NamedTuple]) -> str:
    """What stands if the answer is left out; nothing where the help has said it."""
    if default is None:
        found = (
            {} if name == "settings" else {k: getattr(p, name, None) for k, p in presets.items()}
        )
        known = {kind: value for kind, value in found.items() if value is not None}
        texts = [f"{value} for {kind}" for kind, value in known.items()]
        if len(known) > 1 and len(set(known.values())) == 1:
            texts = [str(*set(known.values()))]
        return f" (default: {', '.join(texts)})" if texts else ""
    return "" if default == () or default is False else f" (default: {default})"


def missing(options, preset: NamedTuple) -> dict[str, Any]:
    """What a preset says where the answer was None; its settings are of the default model."""
    found = {n: value for n, value in preset._asdict().items() if getattr(options, n) is None}
    settings = dict(preset.settings) if options.model is None else {}
    found["settings"] = tuple(sorted((settings | dict(options.settings or ())).items()))
    found["model"] = options.model or "revbifpn_s0"
    return found


def completed(options: Options) -> Options:
    """With the data's defaults in place of None; raises for what is out of range."""
    preset = PRESETS[options.dataset]
    found = missing(options, preset)
    if options.warmup_epochs is None:  # a short run has to reach its learning rate, too
        epochs = preset.epochs if options.epochs is None else options.epochs
        found["warmup_epochs"] = min(preset.warmup_epochs, epochs / 5)
    if options.threads is None and options.data is None:
        found["threads"] = 1  # of such small images, two take as long
    if options.workers is None:
        found["workers"] = min(8, max(1, len(os.sched_getaffinity(0)) - 1))
    options = dataclasses.replace(options, **found)
    _check(options)
    return options


Rules = tuple[tuple[str, Callable[[Any], bool], str], ...]
WHOLE = "a whole number from {} on"
_RULES: Rules = (
    ("epochs seed split_seed", lambda v: v >= 0, WHOLE.format(0)),
    ("batch_size accumulate log_every", lambda v: v >= 1, WHOLE.format(1)),
    ("image_size", lambda v: v is None or v >= 32, WHOLE.format(32)),
    ("threads", lambda v: v is None or v >= 1, WHOLE.format(1)),
    ("workers", lambda v: v is None or v >= 0, WHOLE.format(0)),
    ("lr", lambda v: 0 < v < math.inf, "a positive number"),
    (
        "min_lr warmup_epochs weight_decay clip_grad mixup cutmix checkpoint_minutes",
        lambda v: 0 <= v < math.inf,
        "a number from 0 on",
    ),
    ("label_smoothing ema_decay", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("drop drop_path", lambda v: v is None or 0 <= v < 1, "in [0, 1)"),
    ("erasing", lambda v: 0 <= v <= 1, "in [0, 1]"),
)


def check_rules(options, rules: Rules, error: type[TrainError] = TrainError) -> None:
    """Raise `error` for the first answer that breaks a rule."""
    for fields, is_right, wanted in rules:
        for name in fields.split():
            value = getattr(options, name)
            if not is_right(value):
                raise error(f"{error.command}: {switch(name)} must be {wanted}, got {value}")


def _check(options: Options) -> None:
    check_rules(options, _RULES)
    if options.batch_size % options.accumulate:
        raise TrainError(
            f"train: --accumulate must divide --batch-size {options.batch_size}, got "
            f"{options.accumulate}"
        )
    if options.resume == "auto" and options.out is None:
        raise TrainError("train: --resume auto needs --out, the folder of the run; got none")


def saved(options: Options) -> dict[str, Any]:
    """What a checkpoint keeps of them: all that changes the numbers of a run."""
    return {
        name: getattr(options, name)
        for name, field in FIELDS.items()
        if not field.metadata["is_free"]
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each entry that is not the same."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "settings":
            lines += differences(dict(old or ()), dict(new or ()))
        else:
            shown = switch(name) if name in FIELDS else name
            lines.append(f"{shown}: {old} in the checkpoint, {new} now")
    return lines


def refuse_changes(
    before: dict[str, Any], now: dict[str, Any], error: type[TrainError] = TrainError
) -> None:
    """Raise `error` where a run is resumed with other answers; the message lists them."""
    if lines := differences(before, now):
        raise error(
            f"{error.command}: --resume auto continues a run as it was begun, got other options; "
            "start anew in another --out, or take back:\n  " + "\n  ".join(lines)
        )
