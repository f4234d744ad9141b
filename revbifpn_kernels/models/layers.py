"""The parts of RevBiFPN that are not reversible blocks: stem, neck, head."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Recomputed
from ..mbconv import MBConv
from ..mbconv.modules import ConvNorm
from ..reversible import Step
from ..reversible.recompute import run_transform
from .sizes import STEM_STRIDE, Config


class Stem(nn.Module):
    """Space-to-depth by 4 of the image's channels, repeated until they are `channels` / 16.

    Output channel (p·4 + q)·c + k takes the pixels (4i + p, 4j + q) of channel k mod in_chans, for
    c = `channels` / 16: (N, in_chans, H, W) → (N, channels, ⌈H/4⌉, ⌈W/4⌉). It has no parameters and
    loses nothing. Sides that are not multiples of 4 are padded with zeros at the right and bottom.

    On CPUs the result is in channels_last, which its convolutions read fastest; elsewhere it has
    the image's memory format. Either way each pixel is read and written once.
    """

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.in_chans, self.channels = in_chans, channels

    def forward(self, image: Tensor) -> Tensor:
        n, c, height, width = image.shape
        s = STEM_STRIDE
        h, w = (height + s - 1) // s, (width + s - 1) // s
        # A branch on the sides would fix them in an exported program.
        if torch.compiler.is_exporting() or height % s or width % s:
            image = F.pad(image, (0, w * s - width, 0, h * s - height))
        pixels = image.reshape(n, c, h, s, w, s)
        copies, rest = divmod(self.channels // s**2, self.in_chans)
        if image.is_cpu or image.is_contiguous(memory_format=torch.channels_last):
            pixels = pixels.permute(0, 2, 4, 3, 5, 1)
            repeated = torch.cat([pixels] * copies + [pixels[..., :rest]], dim=-1)
            return repeated.reshape(n, h, w, self.channels).permute(0, 3, 1, 2)
        pixels = pixels.permute(0, 3, 5, 1, 2, 4)
        repeated = torch.cat([pixels] * copies + [pixels[:, :, :, :rest]], dim=3)
        return repeated.reshape(n, self.channels, h, w)

    def inverse(self, x: Tensor) -> Tensor:
        """Return the image, padded to multiples of 4."""
        n, _, h, w = x.shape
        s = STEM_STRIDE
        pixels = x.reshape(n, s, s, self.channels // s**2, h, w)[:, :, :, : self.in_chans]
        return pixels.permute(0, 3, 4, 1, 5, 2).reshape(n, self.in_chans, h * s, w * s)

    def extra_repr(self) -> str:
        return f"{self.in_chans}, {self.channels}"


class Neck(Recomputed):
    """One MBConv per level: `(p_0, …) = neck(x_0, …)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            MBConv(*channels, config.neck_kernel, **config.mbconv_options(level, is_neck=True))
            for level, channels in enumerate(zip(config.widths, config.neck_widths, strict=True))
        )

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        levels = enumerate(zip(self.levels, xs, strict=True))
        return tuple(run_transform(self, f"level {k}", module, x) for k, (module, x) in levels)

    def backward_step(
        self, xs: list[Tensor], grad_ys: list[Tensor | None], step: Step
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        # Level by level, so that only one level's graph is alive at a time.
        grads: list[Tensor | None] = []
        with step.recomputing():
            for k, (module, x, grad) in enumerate(zip(self.levels, xs, grad_ys, strict=True)):
                rerun = step.rerun(f"level {k}", module, x, needs_grad=step.needs_grad[k])
                grads.append(rerun.backward(grad))
        return xs, grads


class Head(Recomputed):
    """Fuses the pyramid from fine to coarse: `(features,) = head(p_0, …)`.

    t_0 = p_0, t_{l+1} = p_{l+1} + MBConv(t_l), then a 1×1 convolution to config.features channels.
    In a chain after the neck it does not save the pyramid, which is half of what S0 would save.
    """

    reruns_before = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = config.pyramid_widths
        self.levels = nn.ModuleList(
            MBConv(*channels, config.neck_kernel, 2, **config.mbconv_options(level, is_neck=True))
            for level, channels in enumerate(itertools.pairwise(widths))
        )
        layers = {"norm_layer": config.norm_layer, "act_layer": config.act_layer}
        self.final = ConvNorm(widths[-1], config.features, 1, **layers)

    def forward(self, *pyramid: Tensor) -> tuple[Tensor]:
        x = pyramid[0]
        for module, coarser in zip(self.levels, pyramid[1:], strict=True):
            x = coarser + module(x)
        return (self.final(x),)
