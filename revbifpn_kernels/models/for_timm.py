"""The models in timm's registry: `timm.create_model("revbifpn_s0", …)`.

Importing `revbifpn_kernels` registers them, before or after timm is imported (`registration.py`).
"""

import dataclasses

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models._registry import generate_default_cfgs
from torch import Tensor

from .create import config_of
from .official import translated
from .revbifpn import RevBiFPN
from .sizes import SIZES, Config

# The authors' own; `pretrained=True` downloads from there, `pretrained_cfg_overlay` reads a file.
_URL = "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/{}.pth.tar"


class TimmRevBiFPN(RevBiFPN):
    """`RevBiFPN` with timm's methods. With num_classes=0 it returns the pooled features."""

    def __init__(self, config: Config, *, has_head: bool = True, reversible: bool = True) -> None:
        classes = config.num_classes
        # A head needs classes to be made; without any, its classifier is taken out again.
        config = dataclasses.replace(config, num_classes=(classes or 1) if has_head else 0)
        super().__init__(config, reversible=reversible)
        if has_head and not classes:
            self.reset_classifier(0)
        self.head_hidden_size = self.num_features
        module = "neck.levels" if config.neck else "body"
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"{module}.{level}"}
            for level, (width, stride) in enumerate(
                zip(config.pyramid_widths, config.strides, strict=True)
            )
        ]
        self.register_load_state_dict_pre_hook(_translate)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the pyramid at `indices`, with the head's map before them if asked."""
        if output_fmt != "NCHW":
            raise ValueError(f"RevBiFPN: output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, _ = feature_take_indices(self.config.levels, indices)
        pyramid = self.pyramid(x)
        chosen = [pyramid[level] for level in taken]
        if intermediates_only:
            return chosen
        return (pyramid[-1] if self.head is None else self.head(*pyramid)[0]), chosen

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take out the head; all levels stay, for each needs the others."""
        taken, _ = feature_take_indices(self.config.levels, indices)
        if prune_head:
            self.head = None
        return taken

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for training without stored activations, which is the default here."""
        self.reversible = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters from the image on, for layer-wise learning rates."""
        block = r"^body\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^neck|^head", (99999,))]}


def _translate(module: TimmRevBiFPN, state_dict: dict, prefix: str, *_) -> None:
    """Take a checkpoint with the authors' names, as timm's loaders bring it, in place."""
    if not prefix and any(name.startswith("rev_stack.") for name in state_dict):
        weights = translated(module, state_dict)
        state_dict.clear()
        state_dict.update(weights)


def _build(name: str, pretrained: bool, **options) -> TimmRevBiFPN:
    is_backbone = options.get("features_only", False)

    def make(
        *,
        num_classes: int = 1000,
        neck: bool = True,
        reversible: bool = True,
        global_pool: str = "avg",
        **overrides,
    ) -> TimmRevBiFPN:
        if global_pool != "avg":
            raise ValueError(f"{name}: global_pool must be 'avg', got {global_pool!r}")
        config = config_of(name, num_classes, neck, overrides)
        return TimmRevBiFPN(config, has_head=not is_backbone, reversible=reversible)

    return build_model_with_cfg(
        make,
        name,
        pretrained,
        pretrained_filter_fn=lambda weights, model: translated(model, weights),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


def _pretrained_cfg(name: str) -> dict:
    side = SIZES[name].resolution
    return {
        "url": _URL.format(name),
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (-(-side // 32), -(-side // 32)),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": None,  # the stem has no weights: any in_chans loads
        "classifier": "classifier",
        "license": "bsd-3-clause",
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _pretrained_cfg(name) for name in SIZES})


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **options) -> TimmRevBiFPN:
        return _build(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name} of revbifpn_kernels, see its `create_model`."
    register_model(entry)


for _name in SIZES:
    if not timm.is_model(_name):
        _register(_name)
