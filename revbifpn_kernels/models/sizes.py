"""The configurations of RevBiFPN-S0 … S6, and checks of their values."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..mbconv.modules import NORM_LAYER, ActLayer, NormLayer
from ..ops.checks import check_lattice, check_mode
from .checks import as_real, as_whole

WIDTHS = (48, 64, 80, 160)
NECK_WIDTHS = (48, 64, 128, 320)
FEATURES = 1280
STEM_STRIDE = 4
MIN_SIDE = 32  # of an image, in pixels


@dataclass(frozen=True)
class Config:
    """All numbers of a RevBiFPN; tuples have one entry per level, finest first.

    Attributes:
        widths: Channels of the streams, multiples of 16.
        neck_widths: Channels of the pyramid, multiples of 16.
        features: Channels before the classifier.
        extra_silos: Silos between all levels, after those that create the levels.
        resolution: Side of the images that the size was made for, in pixels. Others work too.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last silo; it grows linearly from the first silo on.
        num_classes: 0 leaves out the head: the model returns its pyramid. A model's own
            `num_classes` is the number of classes of its present classifier.
        neck: False leaves out the neck: the pyramid is the streams.
        in_chans: Channels of an image, at most widths[0] / 16.
        kernels: Sides of the residual blocks' depthwise kernels, odd.
        extra_kernels: Added to the kernel sides of a silo's edges from each level, which are
            2·stride − 1 downwards and 3 upwards; even.
        neck_kernel: Side of the neck's and the head's depthwise kernels, odd.
        expand_ratios, se_ratios: Arguments of each `MBConv` in blocks and silos.
        neck_expand_ratios, neck_se_ratios: Arguments of each `MBConv` in neck and head.
        mode: How silos enlarge: "bilinear" or "nearest".
        lattice: Exact mode, see `ReversibleSequential`.
        norm_layer, act_layer: See `MBConv`.
    """

    widths: Sequence[int] = WIDTHS
    neck_widths: Sequence[int] = NECK_WIDTHS
    features: int = FEATURES
    extra_silos: int = 2
    resolution: int = 224
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    neck: bool = True
    in_chans: int = 3
    kernels: Sequence[int] = (3, 5, 5, 5)
    extra_kernels: Sequence[int] = (0, 0, 0, 2)
    neck_kernel: int = 5
    expand_ratios: Sequence[float] = (1, 1, 2, 2)
    se_ratios: Sequence[float] = (0.25, 0.25, 0.125, 0.0)
    neck_expand_ratios: Sequence[float] = (1, 2, 2, 2)
    neck_se_ratios: Sequence[float] = (0.25, 0.25, 0.125, 0.125)
    mode: str = "bilinear"
    lattice: float | None = None
    norm_layer: NormLayer = NORM_LAYER
    act_layer: ActLayer = nn.Hardswish

    def __post_init__(self) -> None:
        check_mode("RevBiFPN", self.mode)
        check_lattice("RevBiFPN", self.lattice, torch.float32)
        _check(self)

    @property
    def levels(self) -> int:
        return len(self.widths)

    @property
    def pyramid_widths(self) -> tuple[int, ...]:
        """Channels of the neck's maps; of the streams if there is no neck."""
        return tuple(self.neck_widths if self.neck else self.widths)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per pixel of each level, along a side."""
        return tuple(STEM_STRIDE << level for level in range(self.levels))

    def mbconv_options(self, level: int, is_neck: bool = False) -> dict[str, Any]:
        """Arguments that the `MBConv`s of a level share, in blocks and silos or neck and head."""
        expand_ratios = self.neck_expand_ratios if is_neck else self.expand_ratios
        se_ratios = self.neck_se_ratios if is_neck else self.se_ratios
        ratios = {"expand_ratio": expand_ratios[level], "se_ratio": se_ratios[level]}
        return ratios | {"norm_layer": self.norm_layer, "act_layer": self.act_layer}


def _check(config: Config) -> None:
    levels = len(config.widths) if isinstance(config.widths, Sequence) else 0
    for name in _PER_LEVEL:
        values = getattr(config, name)
        if levels < 2 or not isinstance(values, Sequence) or len(values) != levels:
            raise ValueError(
                f"RevBiFPN: {name} must have an entry for each level, as many as widths and at "
                f"least 2, got {values!r}"
            )
    for names, kind, is_right, wanted in _RULES:
        for name in names.split():
            value = getattr(config, name)
            is_per_level = name in _PER_LEVEL
            converted = [kind(v) for v in (value if is_per_level else (value,))]
            if not all(v is not None and is_right(v) for v in converted):
                raise ValueError(f"RevBiFPN: {name} must be {wanted}, got {value!r}")
            # Stored as Python's own numbers, in tuples: a list could change after this check.
            object.__setattr__(config, name, tuple(converted) if is_per_level else converted[0])
    narrowest = min(*config.widths, *config.neck_widths) // 2  # half a stream, in its blocks
    for name in ("expand_ratios", "neck_expand_ratios"):
        ratios = getattr(config, name)
        if int(narrowest * min(ratios)) < 1:
            raise ValueError(
                f"RevBiFPN: {name} must leave a channel of {narrowest}, the narrowest, got {ratios}"
            )
    room = config.widths[0] // STEM_STRIDE**2
    if config.in_chans > room:
        raise ValueError(
            f"RevBiFPN: in_chans must be 1 to widths[0] / 16 = {room}, got {config.in_chans}; the "
            "stem repeats an image's channels and never mixes them; for more, widen the streams"
        )


def _as_maker(value) -> Callable | None:
    """`value` if it can create modules: callable, but not itself a module."""
    return value if callable(value) and not isinstance(value, nn.Module) else None


FIELDS = {field.name: field.default for field in dataclasses.fields(Config)}
_PER_LEVEL = tuple(name for name, default in FIELDS.items() if isinstance(default, tuple))
_RULES: tuple[tuple[str, Callable, Callable, str], ...] = (
    ("widths neck_widths", as_whole, lambda v: v > 0 and v % 16 == 0, "multiples of 16"),
    ("kernels neck_kernel", as_whole, lambda v: v > 0 and v % 2 == 1, "odd"),
    ("extra_kernels", as_whole, lambda v: v >= 0 and v % 2 == 0, "even, from 0 on"),
    ("features in_chans", as_whole, lambda v: v > 0, "a positive whole number"),
    ("extra_silos num_classes", as_whole, lambda v: v >= 0, "a whole number from 0 on"),
    ("resolution", as_whole, lambda v: v >= MIN_SIDE, f"a whole number from {MIN_SIDE} on"),
    ("drop_rate drop_path_rate", as_real, lambda v: 0 <= v < 1, "in [0, 1)"),
    ("expand_ratios neck_expand_ratios", as_real, lambda v: v > 0, "positive"),
    ("se_ratios neck_se_ratios", as_real, lambda v: 0 <= v <= 1, "in [0, 1]"),
    ("neck", lambda v: v if isinstance(v, bool) else None, lambda v: True, "True or False"),
    ("norm_layer", _as_maker, lambda v: True, "a class or function of the number of channels"),
    ("act_layer", _as_maker, lambda v: True, "a class or function without arguments"),
)


def _scaled(width: float, extra_silos: int, resolution: int, drop_rate, drop_path_rate=0.0):
    """The published configuration of a width multiplier."""
    widths, neck_widths, (features,) = (
        tuple(int(width * channels) // 16 * 16 for channels in unscaled)
        for unscaled in (WIDTHS, NECK_WIDTHS, (FEATURES,))
    )
    return Config(widths, neck_widths, features, extra_silos, resolution, drop_rate, drop_path_rate)


# The paper's row: parameters, MACs at that resolution (counted as `macs().official`), top-1.
SIZES = {  #              width  silos  side  dropout  depth
    "revbifpn_s0": _scaled(1 / 1, 2, 224, 0.25),  #        3,419,196      308,039,716  72.8
    "revbifpn_s1": _scaled(4 / 3, 2, 256, 0.25),  #        5,112,300      616,781,508  75.9
    "revbifpn_s2": _scaled(2 / 1, 2, 256, 0.30),  #       10,576,528    1,370,329,000  79.0
    "revbifpn_s3": _scaled(8 / 3, 3, 288, 0.30, 0.05),  # 19,574,184    3,330,873,312  81.1
    "revbifpn_s4": _scaled(4 / 1, 4, 320, 0.40, 0.1),  #  48,687,336   10,632,222,080  83.0
    "revbifpn_s5": _scaled(16 / 3, 4, 352, 0.40, 0.1),  # 81,998,976   21,848,995,912  83.7
    "revbifpn_s6": _scaled(20 / 3, 5, 352, 0.60, 0.3),  # 142,307,972  38,084,434,748  84.2
}
