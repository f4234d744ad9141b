"""The models in timm's registry: `timm.create_model("revbifpn_s0", …)`.

Importing `revbifpn_kernels` registers them, before or after timm (`timm_registration.py`).
"""

import dataclasses
import logging

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._registry import generate_default_cfgs
from torch import Tensor

from .body import LAYERS_BETWEEN_SILOS
from .checkpoints import fitting
from .create import config_of
from .official import is_official, translated
from .revbifpn import RevBiFPN
from .sizes import SIZES, Config

# The authors' files: `pretrained=True` downloads them, `pretrained_cfg_overlay` reads a local one.
_URL = "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/{}.pth.tar"

register_notrace_module(RevBiFPN)  # timm's torch.fx helpers treat it as one call


class TimmRevBiFPN(RevBiFPN):
    """`RevBiFPN` with timm's methods.

    With num_classes=0 it returns the pooled features, with global_pool="" as well the map before
    pooling. (A `RevBiFPN` with num_classes=0 returns the pyramid; timm: features_only=True.)
    """

    def __init__(
        self,
        config: Config,
        *,
        has_head: bool = True,
        reversible: bool = True,
        global_pool: str = "avg",
    ) -> None:
        classes = config.num_classes
        # A head is only made together with a classifier, which is removed again without classes.
        config = dataclasses.replace(config, num_classes=(classes or 1) if has_head else 0)
        super().__init__(config, reversible=reversible)
        self.global_pool = "avg"
        if has_head and (global_pool != "avg" or not classes):
            self.reset_classifier(classes, global_pool)
        self.head_hidden_size = self.num_features
        module = "neck.levels" if config.neck else "body"
        levels = enumerate(zip(config.pyramid_widths, config.strides, strict=True))
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"{module}.{level}"}
            for level, (width, stride) in levels
        ]
        self.register_load_state_dict_pre_hook(_translate)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return what `RevBiFPN.forward_head` does; with global_pool="" the map itself."""
        if not self.global_pool:
            return self.dropout(features)
        return super().forward_head(features, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; global_pool="" with 0 classes removes the pooling too.

        Raises:
            ValueError: `num_classes` is not a whole number, or `global_pool` is neither "avg" nor
                "" with 0 classes.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool != "avg" and (pool != "" or num_classes):
            raise ValueError(
                "RevBiFPN: global_pool must be 'avg', or '' with num_classes=0, got "
                f"{pool!r} with num_classes={num_classes!r}"
            )
        super().reset_classifier(num_classes)
        self.global_pool = pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the head's map and the pyramid's maps at `indices`, or the latter alone.

        With `stop_early` the coarsest map stands for the head's map. All levels are computed in any
        case, because each depends on the others. No norm follows them: `norm` has no effect.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"RevBiFPN: output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, _ = feature_take_indices(self.config.levels, indices)
        pyramid = self.pyramid(x)
        chosen = [pyramid[level] for level in taken]
        if intermediates_only:
            return chosen
        has_last = self.head is not None and not stop_early
        return (self.head(*pyramid)[0] if has_last else pyramid[-1]), chosen

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the head; all levels stay, because each depends on the others."""
        taken, _ = feature_take_indices(self.config.levels, indices)
        if prune_head:
            self.reset_classifier(0)
            self.head = None
        return taken

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch training without stored activations, which is the default here, on or off."""
        self.reversible = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return groups of parameters, from the image on, for layer-wise learning rates.

        They are the blocks of the body, or with `coarse` each silo with the blocks before it; the
        neck; the head. timm puts what is left, the classifier, last.
        """
        blocks = [(r"^body\.(\d+)\.", None)]
        if coarse:
            stage = LAYERS_BETWEEN_SILOS + 1
            blocks = [(rf"^body\.{k}\.", (k // stage,)) for k in range(len(self.body))]
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^neck", "head": r"^head"}


def _translate(module: TimmRevBiFPN, state_dict: dict, prefix: str, *_) -> None:
    """Rename the authors' names to ours, in place, in a state_dict that timm loads."""
    own = [name for name in state_dict if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): state_dict[name] for name in own}
    if is_official(weights):
        for name in own:
            del state_dict[name]
        weights = translated(module, weights)
        state_dict.update({prefix + name: tensor for name, tensor in weights.items()})


def _build(name: str, pretrained: bool, **options) -> TimmRevBiFPN | FeatureGetterNet:
    is_backbone = options.get("features_only", False)
    feature_cls = options.setdefault("feature_cls", "getter") if is_backbone else "getter"
    if feature_cls not in ("getter", FeatureGetterNet):
        raise ValueError(
            f"{name}: feature_cls must be 'getter', got {feature_cls!r}: streams depend on each "
            "other, so that no layers can be removed, and hooks would see them without their graph"
        )

    notify = logging.getLogger(__name__).info

    def make(*, num_classes=1000, neck=True, reversible=True, global_pool="avg", **overrides):
        config = config_of(name, num_classes, neck, overrides)
        head = {"has_head": not is_backbone, "global_pool": global_pool}
        return TimmRevBiFPN(config, reversible=reversible, **head)

    return build_model_with_cfg(
        make,
        name,
        pretrained,
        pretrained_filter_fn=lambda weights, model: fitting(name, model, weights, notify),
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **options,
    )


def _pretrained_cfg(name: str, side: int) -> dict:
    return {
        "url": _URL.format(name),
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // 32, side // 32),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": (),  # the stem has no weights: any in_chans loads
        "classifier": "classifier",
        "license": "bsd-3-clause",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _pretrained_cfg(name, SIZES[name].resolution) for name in SIZES}
)


def _register(name: str) -> None:
    def entry(pretrained: bool = False, **options) -> TimmRevBiFPN | FeatureGetterNet:
        return _build(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name} of revbifpn_kernels, see its `create_model`."
    register_model(entry)


for _name in SIZES:
    if not timm.is_model(_name):
        _register(_name)
