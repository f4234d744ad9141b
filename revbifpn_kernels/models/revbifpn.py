"""RevBiFPN: stem, reversible body of residual blocks and silos, neck, classification head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..mbconv.stages import is_unwatched
from ..ops.layout import Geometry, in_format
from ..reversible import Reversible, ReversibleSequential
from ..reversible.recompute import group_of
from ..reversible.recompute.snapshot import parts_of
from .body import body
from .checks import whole
from .layers import Head, Neck, Stem
from .sizes import MIN_SIDE, Config


class RevBiFPN(nn.Module):
    """The network of arXiv 2206.14098. Trains without storing the body's activations.

    `model(image)` of (N, in_chans, H, W), sides of 32 pixels or more, returns logits (N, classes).
    With config.num_classes = 0 it returns the pyramid, a list of (N, C_l, ⌈H/s⌉, ⌈W/s⌉), finest
    first, s = 4, 8, 16, 32. Sides that are not multiples of 4 are padded with zeros at the right
    and bottom.

    Between forward and backward it holds its last streams and what the classifier needs; the
    backward recomputes neck and head as it does the body. In training an image that is not finite
    raises before any running statistic changes; on a GPU the check does not wait, and ends the
    process' CUDA context with the same message. Only the image is checked: weights that are not
    finite, and values that overflow inside the network, spoil the statistics as in any network.

    Args:
        config: The numbers, see `Config` and `SIZES`.
        reversible: False trains under plain autograd; may be switched at any time.

    Attributes:
        num_classes: Of the present classifier; the model was made with `config.num_classes`.

    Raises:
        TypeError, ValueError: A number in `config` is out of range, `reversible` is neither True
            nor False, or an image has the wrong shape or dtype.
        RuntimeError: `torch.fx` or `torch.jit.script` tries to read the forward.
    """

    def __init__(self, config: Config, *, reversible: bool = True) -> None:
        super().__init__()
        self.config = config
        self.num_classes, self.num_features = config.num_classes, config.features
        self.stem = Stem(config.in_chans, config.widths[0])
        self.body = body(config)
        self.neck = Neck(config) if config.neck else None
        self.head = Head(config) if config.num_classes else None
        self.dropout = nn.Dropout(config.drop_rate)
        self.classifier: nn.Module = nn.Identity()
        if config.num_classes:
            self.classifier = nn.Linear(config.features, config.num_classes)
        self.reversible = reversible
        self._initialise()

    __prepare_scriptable__ = Reversible.__prepare_scriptable__

    @property
    def reversible(self) -> bool:
        """Whether body, neck and head recompute activations instead of storing them."""
        return self.body.reversible

    @reversible.setter
    def reversible(self, reversible: bool) -> None:
        if not isinstance(reversible, bool):
            raise TypeError(f"RevBiFPN: reversible must be True or False, got {reversible!r}")
        for part in self._parts():
            part.reversible = reversible

    @property
    def lattice(self) -> float | None:
        """Exact mode, see `ReversibleSequential`."""
        return self.body.lattice

    @lattice.setter
    def lattice(self, lattice: float | None) -> None:
        self.body.lattice = lattice

    @property
    def check(self) -> bool:
        """Whether every forward checks itself, see `Reversible.check`."""
        return self.body.check

    @check.setter
    def check(self, check: bool) -> None:
        for part in self._parts():
            part.check = check

    def _parts(self) -> list[nn.Module]:
        return [part for part in (self.body, self.neck, self.head) if part is not None]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        if self.head is None:
            return self.pyramid(image)
        return self.forward_head(self.forward_features(image))

    def streams(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the streams that leave the body, (N, widths[l], …), finest first."""
        self._check_image(image)
        return self.body(self.stem(image))

    def inverse(self, streams: Sequence[Tensor]) -> Tensor:
        """Return the image, padded to multiples of 4, whose `streams` these are."""
        return self.stem.inverse(*self.body.inverse(*streams))

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Return the neck's maps, or the streams if there is no neck, finest first."""
        streams = self.streams(image)
        return list(streams if self.neck is None else self.neck(*streams))

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the map before pooling, (N, features, ⌈H/32⌉, ⌈W/32⌉)."""
        if self.head is None:
            raise RuntimeError("RevBiFPN: a model with num_classes=0 has no head; use pyramid()")
        if not self._is_chained():
            return self.head(*self.pyramid(image))[0]
        return ReversibleSequential(self.neck, self.head, check=self.check)(*self.streams(image))[0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes) from `forward_features`; pooled features if asked."""
        if not features.is_leaf and not torch.compiler.is_compiling():
            # The gradient of the mean has strides of 0, which PyTorch's batch norm sums in another
            # order: gradients of stored and of recomputed activations would differ in some bits.
            is_last = Geometry.of(features).channels_last
            features.register_hook(lambda grad: in_format(grad, is_last))
        pooled = self.dropout(features.mean((2, 3)))
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; with 0 classes the model returns pooled features.

        Raises:
            ValueError: `num_classes` is not a whole number, or `global_pool` is not "avg".
            RuntimeError: The model was made without a head, and classes are asked for.
        """
        num_classes = whole("RevBiFPN", "num_classes", num_classes)
        if global_pool not in (None, "avg"):
            raise ValueError(f"RevBiFPN: global_pool must be 'avg', got {global_pool!r}")
        if self.head is None and num_classes:
            raise RuntimeError("RevBiFPN: a model made with num_classes=0 has no head to reset")
        self.num_classes = num_classes
        like = next(self.parameters())
        options = {"device": like.device, "dtype": like.dtype}
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(self.num_features, num_classes, **options)

    def _is_chained(self) -> bool:
        """Whether neck and head may run as one chain, which need not save the pyramid.

        They may not where hooks, as of FSDP, or a traced graph must see each of their calls.
        """
        return (
            type(self.neck) is Neck
            and type(self.head) is Head
            and self.neck.reversible is self.head.reversible is True
            and all(map(is_unwatched, (*parts_of(self.neck), *parts_of(self.head))))
            and not getattr(self, "_is_replica", False)  # DataParallel hides their parameters
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _check_image(self, image: Tensor) -> None:
        self._check_dtype(image)
        shape = tuple(image.shape)
        in_chans = self.config.in_chans
        if len(shape) != 4 or shape[1] != in_chans:
            raise ValueError(f"RevBiFPN: image must have shape (N, {in_chans}, H, W), got {shape}")
        if min(shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"RevBiFPN: image must have sides of at least {MIN_SIDE} pixels, got {shape}"
            )
        if not self.training:
            return
        coarsest = self.config.strides[-1]
        pixels = shape[0] * -(-shape[2] // coarsest) * -(-shape[3] // coarsest)
        if pixels < 2 and any(map(_needs_pixels, self.modules())):
            got = f"{shape}, of 1/{coarsest} the side there" if shape[0] else f"no image: {shape}"
            raise ValueError(
                "RevBiFPN: image must hold a batch whose coarsest maps have 2 pixels or more in "
                f"training, for batch norm; got {got}"
            )
        # A check on the device: the host would have to wait for the GPU in every step.
        torch._assert_async(
            torch.isfinite(image).all(),
            "RevBiFPN: image must be finite in training, got NaN or infinity, which would have "
            "spoilt all running statistics",
        )

    def _check_dtype(self, image: Tensor) -> None:
        if not isinstance(image, Tensor):
            if isinstance(image, torch.fx.Proxy):
                raise RuntimeError(
                    "RevBiFPN: torch.fx cannot trace it; for feature maps use pyramid(image), or "
                    "features_only=True in timm.create_model; for a graph use torch.export.export; "
                    "in a model that is traced make it a leaf, as by leaf_modules=[RevBiFPN]"
                )
            raise TypeError(f"RevBiFPN: image must be a tensor, got {type(image).__name__}")
        if not image.is_floating_point():
            raise TypeError(
                f"RevBiFPN: image must be floating-point, such as image / 255, got {image.dtype}"
            )
        weight = next(self.parameters(), None)
        # FSDP and quantisation replace the weights by their own, and convert the image.
        is_plain = type(weight) is nn.Parameter and weight.dim() == 4
        device = image.device.type
        is_autocast = device != "meta" and torch.is_autocast_enabled(device)
        if is_plain and image.dtype != weight.dtype and not is_autocast:
            raise TypeError(
                f"RevBiFPN: image must have the model's dtype {weight.dtype} outside autocast, got "
                f"{image.dtype}"
            )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _needs_pixels(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that normalises by the batch of this process."""
    return isinstance(module, _BatchNorm) and module.training and group_of(module) is None
