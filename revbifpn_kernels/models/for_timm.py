"""The models in timm's registry: `timm.create_model("revbifpn_s0", …)`.

Importing `revbifpn_kernels` registers them, before or after timm is imported (`registration.py`).
"""

import dataclasses
import logging

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._registry import generate_default_cfgs
from torch import Tensor

from .body import LAYERS_BETWEEN_SILOS
from .checkpoints import fitting
from .create import config_of
from .official import is_official, translated
from .revbifpn import RevBiFPN
from .sizes import SIZES, Config

_logger = logging.getLogger(__name__)

# The authors' own; `pretrained=True` downloads from there, `pretrained_cfg_overlay` reads a file.
_URL = "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/{}.pth.tar"


class TimmRevBiFPN(RevBiFPN):
    """`RevBiFPN` with timm's methods.

    With num_classes=0 it returns the pooled features, where a `RevBiFPN` returns the pyramid (which
    timm calls features_only=True); with global_pool="" as well, the map before pooling.
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
        # A head needs classes to be made; without any, its classifier is taken out again.
        config = dataclasses.replace(config, num_classes=(classes or 1) if has_head else 0)
        super().__init__(config, reversible=reversible)
        self.global_pool = "avg"
        if has_head and (global_pool != "avg" or not classes):
            self.reset_classifier(classes, global_pool)
        self.head_hidden_size = self.num_features
        module = "neck.levels" if config.neck else "body"
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"{module}.{level}"}
            for level, (width, stride) in enumerate(
                zip(config.pyramid_widths, config.strides, strict=True)
            )
        ]
        self.register_load_state_dict_pre_hook(_translate)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """As `RevBiFPN.forward_head`; with global_pool="" the map itself."""
        if not self.global_pool:
            return self.dropout(features)
        return super().forward_head(features, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; global_pool="" with 0 classes takes out the pooling too.

        Raises:
            ValueError: The classes cannot be counted, or the pooling is neither "avg" nor "" with 0
                classes.
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
        """Return the maps of the pyramid at `indices`, with the head's map before them if asked.

        With `stop_early` the head is left out, and the coarsest map stands for its map; all levels
        are computed in any case, for each needs the others. No norm follows them: `norm` is idle.
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
        """Take out the head; all levels stay, for each needs the others."""
        taken, _ = feature_take_indices(self.config.levels, indices)
        if prune_head:
            self.reset_classifier(0)
            self.head = None
        return taken

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for training without stored activations, which is the default here."""
        self.reversible = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters from the image on, for layer-wise learning rates.

        Blocks of the body, or with `coarse` silos with the blocks before them; neck; head; what is
        left, the classifier, timm puts last.
        """
        blocks = [(r"^body\.(\d+)\.", None)]
        if coarse:
            stage = LAYERS_BETWEEN_SILOS + 1
            blocks = [(rf"^body\.{k}\.", (k // stage,)) for k in range(len(self.body))]
        return {"stem": r"^stem", "blocks": blocks, "neck": r"^neck", "head": r"^head"}


def _translate(module: TimmRevBiFPN, state_dict: dict, prefix: str, *_) -> None:
    """Take a checkpoint with the authors' names, as timm's loaders bring it, in place."""
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
            "other, so that no layers can be taken out, and hooks would see them without their "
            "graph"
        )

    def make(
        *,
        num_classes: int = 1000,
        neck: bool = True,
        reversible: bool = True,
        global_pool: str = "avg",
        **overrides,
    ) -> TimmRevBiFPN:
        config = config_of(name, num_classes, neck, overrides)
        return TimmRevBiFPN(
            config, has_head=not is_backbone, reversible=reversible, global_pool=global_pool
        )

    return build_model_with_cfg(
        make,
        name,
        pretrained,
        pretrained_filter_fn=lambda weights, model: fitting(name, model, weights, _logger.info),
        feature_cfg={"out_indices": (0, 1, 2, 3)},
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
