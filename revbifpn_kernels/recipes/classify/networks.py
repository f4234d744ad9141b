"""The model by name, its norms, the weights it starts from."""

import math
import shlex
import warnings

import torch
from torch import nn

from ... import warmup
from ...mbconv import MBConv
from ...mbconv.modules import NORM_LAYER
from ...models.checkpoints import load_checkpoint
from ...models.create import config_of
from ...models.revbifpn import RevBiFPN
from ...models.sizes import Config
from ..run.errors import RunError
from ..run.networks import dtype_of, freeze, hint_of, refuse_settings
from ..run.processes import World, synchronised
from .data import MODES
from .options import Options


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with groups of eight channels, or of fewer where eight is no divisor."""
    return nn.GroupNorm(channels // math.gcd(channels, 8), channels, eps=1e-3)


def config(options: Options, classes: int) -> Config:
    settings = dict(options.settings)
    refuse_settings(settings)
    given = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
    given["lattice"] = options.lattice
    settings |= {name: value for name, value in given.items() if value is not None}
    settings["norm_layer"] = group_norm if options.norm == "group" else NORM_LAYER
    try:
        numbers = config_of(options.model, classes, True, settings)
    except (TypeError, ValueError) as error:
        raise RunError(f"--model or --set: {error}") from error
    if numbers.in_chans not in MODES:
        raise RunError(f"--set in_chans must be 1 or 3, got {numbers.in_chans}")
    return numbers


def build(options: Options, numbers: Config, is_new: bool = True) -> RevBiFPN:
    """The model on the CPU before the first step; weights are loaded only for a new run."""
    torch.manual_seed(options.seed)
    model = RevBiFPN(numbers, reversible=options.reversible)
    if options.checkpoint is not None and is_new:
        try:
            load_checkpoint(model, options.checkpoint)
        except (OSError, ValueError) as error:
            raise RunError(f"--checkpoint: {error}{hint_of(options.checkpoint)}") from error
        if options.new_head:
            model.reset_classifier(numbers.num_classes)
    elif options.new_head and is_new:
        raise RunError("--new-head needs --checkpoint, got none")
    freeze(model, options.freeze)
    if not any(p.requires_grad for p in model.parameters()):
        raise RunError(f"--freeze must leave parameters to train, got {','.join(options.freeze)}")
    return model


def model_options(options: Options) -> str:
    """The options that describe a run's model, as on a command line."""
    words = ["--model", options.model]
    for name, value in options.settings:
        numbers = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
        words += ["--set", f"{name}={numbers}"]
    return shlex.join(words + (["--norm", options.norm] if options.norm != "batch" else []))


def compile_parts(model: RevBiFPN, backend: str) -> None:
    """Compiles each transform, because chains break the graph; a model that stores, as a whole."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise RunError(f"--compile must be one of {', '.join(known)}, got {backend}")
    if not model.reversible:
        model.compile(backend=backend)
        return
    # Each width and level is a graph of its own: more than the default limit per function.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 1024)
    warnings.filterwarnings("ignore", module="torch._inductor")
    for module in model.modules():
        if isinstance(module, MBConv):
            module.compile(backend=backend)


def compile_kernels(
    options: Options, world: World, numbers: Config, images: int, side: int, gpu: str | None = None
) -> str:
    """Compiles a step's GPU kernels, for the current GPU unless named; a line about it."""
    with torch.device("meta"):
        model = synchronised(RevBiFPN(numbers, reversible=options.reversible), world)
    calls = warmup.calls_of_step(
        model,
        (images, numbers.in_chans, side, side),
        autocast=dtype_of(options),
        channels_last=options.channels_last,
    )
    target = warmup.target_of(gpu)
    return warmup.compile_ahead(calls, target, shows_progress=options.progress)
