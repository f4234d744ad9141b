"""Figures of the report: memory of whole networks, time against memory, the roofline."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.ticker import LogFormatter

from .harness import Row
from .plot import plt

GB, MIB = 1e9, 2**20
# GB an image in training, as published in the paper's figure (small ones read off it).
PAPER = {
    "revbifpn": (0.015, 0.019, 0.029, 0.044, 0.11, 0.23, 0.25),
    "efficientnet": (0.10, 0.185, 0.194, 0.32, 0.53, 1.44, 2.61, 5.05),
}
# Family and mode: colour, marker, name. Dark to light, so that the order survives in grey.
LINES = {
    ("revbifpn", "reversible"): ("#0b4f8a", "o", "RevBiFPN, reversible"),
    ("revbifpn", "stored"): ("#e0a458", "s", "RevBiFPN, stored activations"),
    ("efficientnet", "stored"): ("#7a7a7a", "X", "EfficientNet"),
    ("hrnet", "stored"): ("#5b3a6b", "D", "HRNet"),
    ("bifpn", "stored"): ("#a8c686", "P", "EfficientNet + BiFPN"),
}
RIVALS = {family: style for (family, _), style in LINES.items() if family != "revbifpn"}
PROVIDERS = {
    "reversible": ("#0b4f8a", "o", "reversible"),
    "exact": ("#4f94cd", "D", "reversible, exact"),
    "stored": ("#e0a458", "s", "stored activations"),
    "checkpoint": ("#7a7a7a", "^", "checkpoint a block"),
    "reversible+compile": ("#0b4f8a", "*", "reversible, compiled transforms"),
    "stored+compile": ("#e0a458", "*", "stored, compiled"),
    "compiler recomputes": ("#7a7a7a", "*", "compiler recomputes"),
    "official reversible": ("#8a1c1c", "v", "authors' reversible"),
    "official stored": ("#d98b8b", "<", "authors' stored"),
}


def family_of(name: str) -> str:
    return name.split("_")[0]


def number(row: Row, column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def draw_memory(rows: Iterable[Row]) -> plt.Figure | None:
    """GB that an image adds against MACs: fp32, and bf16 autocast beside it."""
    counted = [row for row in rows if row["mode"] == "an image" and row["gflop"]]
    dtypes = [d for d in ("fp32", "fp32+bf16") if any(row["dtype"] == d for row in counted)]
    if not counted:
        return None
    figure, grid = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 4.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        points = [row for row in counted if row["dtype"] == dtype]
        for key, style in LINES.items():
            _draw_family(axes, points, key, style)
        axes.set_title({"fp32": "fp32", "fp32+bf16": "bf16 autocast"}[dtype], fontsize=10)
        axes.set(xscale="log", yscale="log", xlabel="multiply-adds of an evaluation, G")
        axes.grid(lw=0.3)
    _draw_paper([row for row in counted if row["dtype"] == "fp32"], grid[0][0])
    grid[0][0].set_ylabel("training memory an image, GB")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * len(dtypes), frameon=False,
                  fontsize=8)  # fmt: skip
    figure.supxlabel(
        "each network at its own resolution; slope of a step's peak between batches of 2 and 4, "
        "counted\non fake tensors; hollow: as published in arXiv 2206.14098",
        fontsize=7,
    )
    return figure


def _draw_family(axes: plt.Axes, rows: list[Row], key: tuple[str, str], style) -> None:
    color, marker, label = style
    mine = [row for row in rows if (family_of(row["op"]), row["provider"]) == key]
    points = sorted((_gmacs(row), number(row, "peak_mib") * MIB / GB, row["op"]) for row in mine)
    if not points:
        return
    xs, ys, names = zip(*points, strict=True)
    axes.plot(xs, ys, color=color, marker=marker, label=label, lw=1)
    for x, y, name in dict.fromkeys((points[0], points[-1])):
        short = name.split("_")[1].upper()
        axes.annotate(short, (x, y), (4, -9), textcoords="offset points", fontsize=7)


def _draw_paper(rows: list[Row], axes: plt.Axes) -> None:
    for family, published in PAPER.items():
        mode = "reversible" if family == "revbifpn" else "stored"
        color, marker, label = LINES[family, mode]
        macs = {
            int(row["op"][-1]): _gmacs(row)
            for row in rows
            if family_of(row["op"]) == family and row["provider"] == mode
        }
        points = [(macs[k], gb) for k, gb in enumerate(published) if k in macs]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=color, marker=marker, ls=":", lw=0.8, mfc="none",
                      label=f"{label.split(',')[0]}, the paper's")  # fmt: skip


def _gmacs(row: Row) -> float:
    return number(row, "gflop") / 2


def depth_of(row: Row) -> int | None:
    match = re.fullmatch(r"revbifpn_s0 with (\d+) extra silos", row["op"])
    return int(match[1]) if match else None


def draw_depth(rows: Iterable[Row]) -> plt.Figure | None:
    """What an image adds against the number of extra silos."""
    rows = [row for row in rows if row["mode"] == "depth"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(6.0, 3.9), layout="constrained")
    for provider in ("stored", "reversible"):
        color, marker, label = PROVIDERS[provider]
        mine = sorted((depth_of(r), r) for r in rows if r["provider"] == provider)
        depths = [depth for depth, _ in mine]
        for column, line, what in (("peak_mib", "-", "peak"), ("saved_mib", ":", "held")):
            sizes = [number(row, column) for _, row in mine]
            axes.plot(depths, sizes, color=color, marker=marker, ls=line, label=f"{label}: {what}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, depths)
    axes.set(yscale="log", xlabel="extra silos of S0, four levels", ylabel="MiB an image adds")
    axes.grid(lw=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("224 px, fp32, counted on fake tensors, batches of 128 and 256", fontsize=7)
    return figure


def draw_pareto(steps: Sequence[Row]) -> plt.Figure | None:
    """Images a second against the peak of a step: a panel a network of ours, with its front."""
    steps = [row for row in steps if row["ms_p50"]]
    names = dict.fromkeys(row["op"] for row in steps if row["provider"] == "reversible")
    if not names:
        return None
    figure, grid = plt.subplots(
        1, len(names), figsize=(4.4 * len(names), 4.6), squeeze=False, layout="constrained"
    )
    for axes, name in zip(grid[0], names, strict=True):
        _draw_front(axes, [row for row in steps if row["op"] == name])
        axes.set_title(f"{name}, {next(r['shape'] for r in steps if r['op'] == name)}", fontsize=9)
        axes.set(yscale="log", xlabel="images a second, a training step")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(LogFormatter())
        axes.grid(lw=0.3)
    grid[0][0].set_ylabel("peak MiB above parameters,\ntheir gradients and momentum")
    labelled = {}
    for axes in grid[0]:
        labelled |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=3,
                  frameon=False, fontsize=8)  # fmt: skip
    figure.supxlabel(conditions(steps[0]) + "\ndotted: the Pareto front", fontsize=7)
    return figure


def _draw_front(axes: plt.Axes, rows: list[Row]) -> None:
    points = []
    for row in rows:
        color, marker, label = PROVIDERS[row["provider"]]
        point = number(row, "images_per_s"), number(row, "peak_mib")
        axes.plot(*point, marker, color=color, mec="black", mew=0.5, ms=9, label=label)
        points.append(point)
    front = sorted(p for p in points if not any(_beats(q, p) for q in points))
    axes.plot(*zip(*front, strict=True), color="black", ls=":", lw=1, zorder=0)


def _beats(q: tuple[float, float], p: tuple[float, float]) -> bool:
    return q != p and q[0] >= p[0] and q[1] <= p[1]


def draw_roofline(steps: Sequence[Row], peaks: Sequence[Row]) -> plt.Figure | None:
    """GFLOP/s against FLOP a byte of compulsory traffic, under what was measured."""
    steps = [row for row in steps if row["ms_p50"] and row["gflop"]]
    measured = {row["provider"]: row for row in peaks}
    if not steps or len(measured) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    top, bandwidth = number(measured["matmul"], "gflop"), number(measured["copy"], "gbps")
    intensity = [_intensity(row) for row in steps]
    xs = np.geomspace(min(intensity) / 2, max([*intensity, top / bandwidth]) * 2, 100)
    axes.plot(xs, np.minimum(top, bandwidth * xs), color="black", lw=1.2,
              label=f"roof: {top:.0f} GFLOP/s, {bandwidth:.0f} GB/s")  # fmt: skip
    seen = set()
    for row in steps:
        color, marker, label = RIVALS.get(family_of(row["op"]), PROVIDERS[row["provider"]])
        achieved = number(row, "gflop") / number(row, "ms_p50") * 1e3
        axes.plot(_intensity(row), achieved, marker, color=color, mec="black", mew=0.5, ms=8,
                  label=None if label in seen else label)  # fmt: skip
        seen.add(label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of compulsory traffic",
             ylabel="GFLOP/s, computing again counts as none")  # fmt: skip
    axes.grid(lw=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel(conditions(steps[0]), fontsize=7)
    return figure


def _intensity(row: Row) -> float:
    return number(row, "gflop") * 1e9 / (number(row, "traffic_mib") * MIB)


def conditions(row: Row) -> str:
    dtype = {"fp32": "fp32", "fp32+bf16": "bf16 autocast"}[row["dtype"]]
    versions = f"torch {row['torch'].split('+')[0]}, commit {row['commit']}"
    return f"{row['device']}, {versions}, {row['date']}, {dtype}"
