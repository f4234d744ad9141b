"""The model by name, its norms, the parts that stay frozen, the weights it starts from."""

import math
import shlex
import warnings
from collections.abc import Iterable

import safetensors
import torch
from torch import nn

from ...mbconv import MBConv
from ...mbconv.modules import NORM_LAYER
from ...models.checkpoints import load_checkpoint
from ...models.create import config_of
from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from .data import MODES
from .options import Options, TrainError

MADE_WITH = "options"  # of the model, in the metadata of a run's weights


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of eight channels, or fewer where eight do not divide them."""
    return nn.GroupNorm(channels // math.gcd(channels, 8), channels, eps=1e-3)


def config(options: Options, classes: int) -> Config:
    settings = dict(options.settings)
    refuse_settings(settings)
    for name, value in (
        ("drop_rate", options.drop),
        ("drop_path_rate", options.drop_path),
        ("lattice", options.lattice),
    ):
        if value is not None:
            settings[name] = value
    settings["norm_layer"] = group_norm if options.norm == "group" else NORM_LAYER
    try:
        numbers = config_of(options.model, classes, True, settings)
    except (TypeError, ValueError) as error:
        raise TrainError(f"train: --model or --set: {error}") from error
    if numbers.in_chans not in MODES:
        raise TrainError(f"train: --set in_chans must be 1 or 3, got {numbers.in_chans}")
    return numbers


def refuse_settings(settings: dict, error: type[TrainError] = TrainError) -> None:
    """Raise `error` for numbers of a model that follow from the data and the command."""
    for name in ("num_classes", "neck", "norm_layer", "act_layer"):
        if name in settings:
            raise error(f"{error.command}: --set cannot change {name}, got {settings[name]!r}")


def build(options: Options, numbers: Config, is_new: bool = True) -> RevBiFPN:
    """The model on the CPU before the first step; without loaded weights if it is not `is_new`."""
    torch.manual_seed(options.seed)
    model = RevBiFPN(numbers, reversible=options.reversible)
    if options.checkpoint is not None and is_new:
        try:
            load_checkpoint(model, options.checkpoint)
        except (OSError, ValueError) as error:
            raise TrainError(
                f"train: --checkpoint: {error}{hint_of(options.checkpoint)}"
            ) from error
        if options.new_head:
            model.reset_classifier(numbers.num_classes)
    elif options.new_head and is_new:
        raise TrainError("train: --new-head needs --checkpoint, got none")
    freeze(model, options.freeze)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainError(
            f"train: --freeze must leave parameters to train, got {','.join(options.freeze)}"
        )
    return model


def model_options(options: Options) -> str:
    """The options that name a run's model, as they are written on a command line."""
    words = ["--model", options.model]
    for name, value in options.settings:
        numbers = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        words += ["--set", f"{name}={numbers}"]
    return shlex.join(words + (["--norm", options.norm] if options.norm != "batch" else []))


def hint_of(weights: str) -> str:
    """The model options of the run that wrote a file, if one of ours did."""
    try:
        with safetensors.safe_open(weights, "pt") as file:
            written = (file.metadata() or {}).get(MADE_WITH)
    except (OSError, safetensors.SafetensorError):
        return ""
    return f"; it was trained with {written}" if written else ""


def freeze(model: RevBiFPN, parts: tuple[str, ...]) -> None:
    for part in parts:
        try:
            module = model.get_submodule(part)
        except AttributeError:
            known = [name for name, _ in model.named_children()]
            raise TrainError(
                f"train: --freeze must name parts of the model, such as {', '.join(known)} or "
                f"body.0, got {part!r}"
            ) from None
        module.requires_grad_(False)


def to_training(model: nn.Module, frozen: Iterable[str]) -> None:
    """Frozen parts keep their running statistics, and drop nothing."""
    model.train()
    for part in frozen:
        model.get_submodule(part).eval()


def compile_parts(model: RevBiFPN, backend: str) -> None:
    """A chain breaks the compiler's graph, its transforms do not; stored it has no chains."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise TrainError(f"train: --compile must be one of {', '.join(known)}, got {backend}")
    if not model.reversible:
        model.compile(backend=backend)
        return
    # Every width and level is a graph of its own: more than the default limit of one function.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 1024)
    warnings.filterwarnings("ignore", module="torch._inductor")
    for module in model.modules():
        if isinstance(module, MBConv):
            module.compile(backend=backend)
