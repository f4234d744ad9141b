"""RevBiFPN: stem, reversible body of residual blocks and silos, neck, classification head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .body import body
from .layers import Head, Neck, Stem
from .sizes import Config

MIN_SIDE = 32


class RevBiFPN(nn.Module):
    """The network of arXiv 2206.14098. Trains without storing the body's activations.

    `model(image)` of (N, in_chans, H, W), sides of 32 pixels or more, returns logits (N, classes).
    With config.num_classes = 0 it returns the pyramid, a list of (N, C_l, ⌈H/s⌉, ⌈W/s⌉), finest
    first, s = 4, 8, 16, 32. Sides that are no multiples of 4 are padded with zeros at the right
    and bottom.

    Between forward and backward it holds its last streams, the pyramid, and what the classifier
    needs; neck and head run again in the backward, as the body does. In training an image that is
    not finite raises before any running statistic moves; on a GPU the check does not wait, and
    ends the process' CUDA context with the same message.

    Args:
        config: The numbers, see `Config` and `SIZES`.
        reversible: False trains under plain autograd; may be switched at any time.

    Raises:
        ValueError: A number in `config` is out of range; an image has the wrong shape.
    """

    def __init__(self, config: Config, *, reversible: bool = True) -> None:
        super().__init__()
        self.config = config
        self.num_classes, self.num_features = config.num_classes, config.features
        self.stem = Stem(config.in_chans, config.widths[0])
        self.body = body(config)
        self.neck = Neck(config) if config.neck else None
        self.head: Head | None = None
        if config.num_classes:
            self.head = Head(config)
            self.dropout = nn.Dropout(config.drop_rate)
            self.classifier = nn.Linear(config.features, config.num_classes)
        self.reversible = reversible
        self._initialise()

    @property
    def reversible(self) -> bool:
        """Whether body, neck and head compute activations again instead of storing them."""
        return self.body.reversible

    @reversible.setter
    def reversible(self, reversible: bool) -> None:
        for part in (self.body, self.neck, self.head):
            if part is not None:
                part.reversible = reversible

    @property
    def lattice(self) -> float | None:
        """Exact mode, see `ReversibleSequential`."""
        return self.body.lattice

    @lattice.setter
    def lattice(self, lattice: float | None) -> None:
        self.body.lattice = lattice

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
        """Return what leaves the neck, or the streams without one, finest first."""
        streams = self.streams(image)
        return list(streams if self.neck is None else self.neck(*streams))

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the map before pooling, (N, features, ⌈H/32⌉, ⌈W/32⌉)."""
        if self.head is None:
            raise RuntimeError("RevBiFPN: a model with num_classes=0 has no head; use pyramid()")
        return self.head(*self.pyramid(image))[0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes) from `forward_features`; pooled features if asked."""
        pooled = self.dropout(features.mean((2, 3)))
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; with 0 classes the model returns pooled features.

        Raises:
            ValueError: Another pooling than "avg" is asked for.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"RevBiFPN: global_pool must be 'avg', got {global_pool!r}")
        if self.head is None:
            raise RuntimeError("RevBiFPN: a model made with num_classes=0 has no head to reset")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )

    def _check_image(self, image: Tensor) -> None:
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
        if shape[0] * -(-shape[2] // coarsest) * -(-shape[3] // coarsest) < 2:
            raise ValueError(
                "RevBiFPN: image must hold a batch whose coarsest maps have 2 pixels or more in "
                f"training, for batch norm; got {shape}, of 1/{coarsest} the side there"
            )
        # A device-side check: asking the host would make it wait for the GPU in every step.
        torch._assert_async(
            torch.isfinite(image).all(),
            "RevBiFPN: image must be finite in training, got NaN or infinity, which would have "
            "spoilt all running statistics",
        )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
