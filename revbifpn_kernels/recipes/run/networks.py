"""What both applications do to a model: freezing, settings, hints about files of weights."""

from collections.abc import Iterable

import safetensors
import torch
from torch import nn

from .errors import RunError

MODEL_OPTIONS = "options"  # metadata key of weights for the options that describe the model

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


def refuse_settings(settings: dict) -> None:
    """Raises `RunError` for settings of a model that follow from the data and other options."""
    for name in ("num_classes", "neck", "norm_layer", "act_layer"):
        if name in settings:
            raise RunError(f"--set cannot change {name}, got {settings[name]!r}")


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    for part in parts:
        try:
            module = model.get_submodule(part)
        except AttributeError:
            known = [name for name, _ in model.named_children()]
            raise RunError(
                f"--freeze must name parts of the model, such as {', '.join(known)} or body.0, "
                f"got {part!r}"
            ) from None
        module.requires_grad_(False)


def to_training(model: nn.Module, frozen: Iterable[str]) -> None:
    """Sets a model to training mode, its frozen parts to eval mode."""
    model.train()
    for part in frozen:
        model.get_submodule(part).eval()


def hint_of(weights: str) -> str:
    """For an error message: the model options of the run that wrote a file of weights, if known."""
    try:
        with safetensors.safe_open(weights, "pt") as file:
            written = (file.metadata() or {}).get(MODEL_OPTIONS)
    except (OSError, safetensors.SafetensorError):
        return ""
    return f"; it was trained with {written}" if written else ""


def dtype_of(options) -> torch.dtype | None:
    """The dtype of autocast, None without it."""
    return None if options.amp == "none" else getattr(torch, options.amp)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
