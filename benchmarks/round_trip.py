"""Draws one fusion of photographs and its inverse: `python -m benchmarks.round_trip`."""

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import revbifpn_kernels as ours

from .lib.photos import color_pyramid
from .lib.plot import FIGURES, save

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

LATTICE = 2.0**-12
WEIGHT = 0.2  # of each source, so that the double exposure stays in range
DARKEST = 2.0**-23  # one step of float32 at 1


def fuse_and_restore(
    x: Tensor, sources: list[Tensor], lattice: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The fused map, the restored one, and the absolute error of every element."""
    fused = ours.resample_add(x, sources, lattice=lattice)
    restored = ours.resample_add(fused, sources, alpha=-1.0, lattice=lattice)
    return fused, restored, (restored - x).abs()


def _show(axes: plt.Axes, image: Tensor, title: str) -> None:
    axes.imshow(image[0].movedim(0, -1).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def _show_pyramid(axes: plt.Axes, sources: list[Tensor]) -> None:
    """The coarser levels side by side, each at its own size, on white."""
    height = sources[0].shape[2]
    width = sum(source.shape[3] for source in sources) + 12 * (len(sources) - 1)
    canvas = torch.ones(1, 3, height, width)
    left = 0
    for source in sources:
        h, w = source.shape[2:]
        canvas[:, :, height - h :, left : left + w] = source.cpu() / WEIGHT
        left += w + 12
    _show(axes, canvas, f"sources $s_1, s_2, s_3$, times {1 / WEIGHT:.0f}")


def _show_error(axes: plt.Axes, error: Tensor, text: str) -> plt.cm.ScalarMappable:
    worst = error.amax(1)[0].cpu().numpy()
    picture = axes.imshow(worst, cmap="gray_r", vmin=0, vmax=DARKEST, interpolation="nearest")
    largest = error.max().item()
    verdict = f"largest error {largest:.1e}" if largest else "every bit restored, error 0"
    axes.set_title(f"{text}: {verdict}", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


def draw(device: str) -> plt.Figure:
    """Input pyramid → fused → restored, and the error with and without a lattice."""
    x = color_pyramid(0, 1)[0].to(device)
    x = (x / LATTICE).round() * LATTICE
    sources = [WEIGHT * level.to(device) for level in color_pyramid(1, 4)[1:]]
    fused, restored, error = fuse_and_restore(x, sources, None)
    _, _, lattice_error = fuse_and_restore(x, sources, LATTICE)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.1), layout="constrained")
    _show(axes[0, 0], x, "stream $x$")
    _show_pyramid(axes[0, 1], sources)
    brightest = 1 + 3 * WEIGHT
    title = rf"fused: $y = x + \sum_k R_k(s_k)$, divided by {brightest:.1f}"
    _show(axes[0, 2], fused / brightest, title)
    _show(axes[1, 0], restored, r"restored: $y - \sum_k R_k(s_k)$")
    _show_error(axes[1, 1], error, "fp32")
    picture = _show_error(axes[1, 2], lattice_error, "fp32 on the lattice $2^{-12}$")
    bar = figure.colorbar(picture, ax=axes[1, 2], pad=0.02, ticks=[0, DARKEST / 2, DARKEST])
    bar.set_ticklabels(["0", "$2^{-24}$", "$2^{-23}$"])
    bar.set_label("|restored − x|", fontsize=9)
    sides = "×".join(map(str, x.shape[2:]))
    figure.suptitle(
        f"resample_add and its inverse (alpha = −1): float32, {sides} pixels, {x.device.type}, "
        f"torch {torch.__version__}",
        fontsize=11,
    )
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_trip", description=__doc__)
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR")
    run = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    save(draw(device), run.output / "round_trip")


if __name__ == "__main__":
    main()
