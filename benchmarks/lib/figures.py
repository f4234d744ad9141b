"""Draws the figures that the docs show, from rows alone; conditions stand in their captions."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import revbifpn_kernels as ours

from .markdown import by, latest_device, network, number, of_mode, side_of
from .memory_tables import gigabytes, images_of
from .record import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import LogFormatter  # noqa: E402

plt.rcParams |= {"font.size": 12, "grid.linewidth": 0.3, "figure.constrained_layout.use": True}
# Colour, marker, name: dark to light, so that the order survives in grey.
MODES = {
    "reversible": ("#0b4f8a", "o", "reversible"),
    "exact": ("#4f94cd", "D", "exact mode"),
    "checkpoint": ("#7a7a7a", "^", "checkpoint"),
    "stored": ("#e0a458", "s", "stored"),
    "official reversible": ("#8a1c1c", "v", "authors, reversible"),
    "official stored": ("#d98b8b", "<", "authors, stored"),
    "reversible+compile": ("#0b4f8a", "*", "reversible, compiled"),
    "stored+compile": ("#e0a458", "*", "stored, compiled"),
    "compiler recomputes": ("#7a7a7a", "*", "compiler recomputes"),
    "stored+max-autotune": ("#e0a458", "P", "stored, compiled and tuned"),
}
FAMILIES = {  # and mode
    ("efficientnet", "stored"): ("#7a7a7a", "X", "EfficientNet"),
    ("revbifpn", "stored"): ("#e0a458", "s", "RevBiFPN, stored"),
    ("hrnet", "stored"): ("#5b3a6b", "D", "HRNet"),
    ("revbifpn", "reversible"): ("#0b4f8a", "o", "RevBiFPN, reversible"),
}
LATTICE = 2.0**-12
WEIGHT = 0.2  # of each source, so that the double exposure stays in range


def depth(memory: Sequence[Row]) -> plt.Figure | None:
    """Peak memory of a step per image against the number of silos."""
    found = by(of_mode(memory, "depth"), "provider", "extra_silos")
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    silos = sorted({int(extra) for _, extra in found})
    for provider in ("stored", "checkpoint", "reversible"):
        color, marker, label = MODES[provider]
        sizes = [number(found.get((provider, str(extra))), "peak_mib") for extra in silos]
        if None in sizes:
            continue
        axes.plot(silos, sizes, color=color, marker=marker, lw=2)
        axes.annotate(label, (silos[-1], sizes[-1]), (8, -4), textcoords="offset points",
                      color=color, weight="bold")  # fmt: skip
    axes.set_xticks(silos, silos)
    axes.set_xlim(right=silos[-1] * 1.25)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="RevSilos that fuse all levels", ylabel="peak MiB per image")
    axes.grid()
    return figure


def memory_macs(memory: Sequence[Row]) -> plt.Figure | None:
    """Training memory per image against the multiply-adds of an evaluation."""
    images = {key: row for key, row in images_of(memory).items() if key[2] == "fp32"}
    if not images:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for (family, provider), (color, marker, label) in FAMILIES.items():
        points = sorted(
            (number(row, "gmacs"), gigabytes(row), op)
            for (op, mode, _), row in images.items()
            if op.startswith(family) and mode == provider and row.get("gmacs")
        )
        if not points:
            continue
        xs, ys, names = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, marker=marker, lw=2, label=label)
        for k in {0, len(names) - 1}:
            text = names[k].split("_")[1].upper()
            axes.annotate(text, (xs[k], ys[k]), (5, -13), textcoords="offset points", fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds of an evaluation, 10⁹",
             ylabel="GB per image")  # fmt: skip
    axes.grid()
    axes.legend(frameon=False, fontsize=11, loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 8)
    return figure


def case_of(step: Row) -> tuple[str, str, str]:
    return step["op"], step["shape"], step.get("layout", "")


def pareto(steps: Sequence[Row]) -> plt.Figure | None:
    """Images per second against the peak of a step: a panel per network of ours."""
    steps = [r for r in of_mode(latest_device(steps), "step") if r.get("ms_p50")]
    cases = dict.fromkeys(case_of(r) for r in steps if r["provider"] == "reversible")
    if not cases:
        return None
    figure, grid = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 4.4), squeeze=False)
    for axes, case in zip(grid[0], cases, strict=True):
        for row in steps:
            if case_of(row) == case and row.get("peak_mib"):
                provider = row["provider"].removesuffix("+graph")
                color, marker, label = MODES[provider]
                is_graph = provider != row["provider"]  # drawn hollow
                style = {"mfc": "none", "mec": color, "mew": 1.5} if is_graph else {
                    "mec": "black", "mew": 0.5}  # fmt: skip
                label += ", CUDA graph" if is_graph else ""
                point = number(row, "images_per_s"), number(row, "peak_mib")
                axes.plot(*point, marker, color=color, ms=11, label=label, **style)
        batch = case[1].split("x")[0]
        axes.set_title(f"{network(case[0])}, {batch} images of {side_of({'shape': case[1]})} px",
                       fontsize=11)  # fmt: skip
        axes.set(yscale="log", xlabel="images per second in training")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid()
    grid[0][0].set_ylabel("peak MiB of a step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=1 + len(cases), frameon=False,
                  fontsize=10)  # fmt: skip
    return figure


def _photographs(levels: int) -> tuple[Tensor, list[Tensor]]:
    """One of scikit-learn's photographs in colour, and another one at 1/2, 1/4, … of its side."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    x, other = (torch.tensor(image).movedim(-1, 0)[None, :, :416] / 255 for image in images)
    return x, [F.avg_pool2d(other, 2**level) for level in range(1, levels + 1)]


def round_trip() -> plt.Figure:
    """A photograph, fused with another's pyramid, restored; and the error of exact mode and not."""
    x, sources = _photographs(3)
    x = (x / LATTICE).round() * LATTICE
    sources = [WEIGHT * source for source in sources]
    fused = ours.resample_add(x, sources)
    errors = {}
    for name, lattice in (("float32", None), ("exact mode", LATTICE)):
        y = ours.resample_add(x, sources, lattice=lattice)
        restored = ours.resample_add(y, sources, alpha=-1.0, lattice=lattice)
        errors[name] = (restored - x).abs().amax(1)[0]
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.0))
    for panel, image, title in ((axes[0], x, "stream"), (axes[1], fused / 1.6, "fused")):
        panel.imshow(image[0].movedim(0, -1).clamp(0, 1)[::2, ::2].numpy())
        panel.set_title(title, fontsize=10)
    for panel, (name, error) in zip(axes[2:], errors.items(), strict=True):
        panel.imshow(F.max_pool2d(error[None], 8)[0].numpy(), cmap="gray_r", vmin=0, vmax=2.0**-22)
        panel.set_title(f"error, {name}: {error.max().item():.1g}", fontsize=10)
    for panel in axes:
        panel.set(xticks=[], yticks=[])
    return figure


def draw(folder: Path, memory: Sequence[Row], steps: Sequence[Row]) -> None:
    """Write each figure that has rows."""
    figures = {
        "depth": depth(memory),
        "memory-macs": memory_macs(memory),
        "pareto": pareto(steps),
        "round_trip": round_trip(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=70 if name == "round_trip" else 120)
            Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
            plt.close(figure)
            print(f"figure: {path}")
