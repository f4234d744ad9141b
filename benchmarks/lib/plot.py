"""Draws the recorded rows: `python -m benchmarks.plot`. Reads CSV only."""

import argparse
import re
from pathlib import Path

import matplotlib

from .harness import Row, read_rows, slug

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.patches import Patch  # noqa: E402

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
# Dark to light, so that the order survives in grey; one colour a provider in every figure.
COLORS = {"ours": "#0b4f8a", "compile": "#d9822b", "torch": "#e8cfa6"}
NAMES = {"ours": "ours", "compile": "torch.compile", "torch": "PyTorch eager"}
COPIES = {"copy": ("-", "copy into a buffer"), "clone": (":", "clone (copy into new memory)")}
OPS = {
    ("resample_add", "fwd"): "add",
    ("resample_add_", "fwd"): "add_\n(in place)",
    ("resample_add", "inverse"): "inverse",
    ("resample_adjoint", "bwd"): "adjoint",
    ("resample_undo", "inverse+bwd"): "undo",
}
# Training steps: colour, marker, name.
STEPS = {
    "stored": ("#e0a458", "s", "stored activations"),
    "checkpoint": ("#7a7a7a", "^", "checkpoint a block"),
    "reversible": ("#0b4f8a", "o", "reversible"),
}
Panel = tuple[str, str, str]


def save(figure: plt.Figure, path: Path) -> None:
    """Write `path`.svg and `path`.png; the SVG is the same for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = path.name
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})
    figure.savefig(path.with_name(path.name + ".png"), dpi=130)
    plt.close(figure)
    print(f"figure: {path}.svg, .png")


def _panels(rows: list[Row]) -> dict[Panel, list[Row]]:
    """Rows by (shape, layout, dtype), each shape at the most threads that it was given."""
    timed = [row for row in rows if (row["op"], row["mode"]) in OPS]
    threads: dict[str, int] = {}
    for row in timed:
        threads[row["shape"]] = max(threads.get(row["shape"], 0), int(row["threads"]))
    panels: dict[Panel, list[Row]] = {}
    for row in timed:
        if int(row["threads"]) == threads[row["shape"]]:
            panels.setdefault((_shape_label(row), row["layout"], row["dtype"]), []).append(row)
    return panels


def _shape_label(row: Row) -> str:
    sides = row["shape"].replace("x", "×")
    plural = "" if row["threads"] == "1" else "s"
    return sides if row["cuda"] else f"{sides}\n{row['threads']} thread{plural}"


def _gbps(rows: list[Row], op: tuple[str, str], provider: str) -> float | None:
    for row in rows:
        if (row["op"], row["mode"]) == op and row["provider"] == provider and row["gbps"]:
            return float(row["gbps"])
    return None


def _draw_panel(axes: plt.Axes, rows: list[Row]) -> None:
    """Bars: GB/s op by op; lines across an op's bars: the copies timed in the same turns."""
    present = {row["provider"] for row in rows}
    bars = [(provider, color) for provider, color in COLORS.items() if provider in present]
    width = 0.8 / max(len(bars), 1)
    for place, op in enumerate(OPS):
        for shift, (provider, color) in enumerate(bars):
            value = _gbps(rows, op, provider)
            if value is not None:
                left = place - 0.4 + shift * width
                axes.bar(left, value, width, align="edge", color=color, edgecolor="black", lw=0.4)
        ours, eager = (_gbps(rows, op, provider) for provider in ("ours", "torch"))
        if ours and eager:
            axes.annotate(
                f"{ours / eager:.1f}×", (place - 0.4, ours), (0, 1), textcoords="offset points",
                fontsize=7,
            )  # fmt: skip
        for name, (style, _) in COPIES.items():
            value = _gbps(rows, op, name)
            if value is not None:
                axes.hlines(value, place - 0.46, place + 0.46, "black", style, lw=1.3)
    axes.set_xticks(range(len(OPS)), OPS.values(), fontsize=8)
    axes.grid(axis="y", lw=0.3)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, len(OPS) - 0.4)


def _legend(figure: plt.Figure, rows: list[Row]) -> None:
    present = {row["provider"] for row in rows}
    handles = [
        Patch(facecolor=color, edgecolor="black", lw=0.4, label=NAMES[name])
        for name, color in COLORS.items()
        if name in present
    ]
    handles += [
        plt.Line2D([], [], color="black", ls=style, lw=1.3, label=label)
        for name, (style, label) in COPIES.items()
        if name in present
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)


def draw_ops(rows: list[Row]) -> plt.Figure | None:
    """A grid of panels, shapes and layouts by dtypes; None if no row is an op's."""
    panels = _panels(rows)
    if not panels:
        return None
    shapes = list(dict.fromkeys(shape for shape, _, _ in panels))
    lines = dict.fromkeys((shape, layout) for shape, layout, _ in panels)
    lines = sorted(lines, key=lambda line: shapes.index(line[0]))
    dtypes = list(dict.fromkeys(dtype for _, _, dtype in panels))
    size = (4.4 * len(dtypes) + 0.6, 2.3 * len(lines) + 1.3)
    figure, grid = plt.subplots(
        len(lines), len(dtypes), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for line, (shape, layout) in zip(grid, lines, strict=True):
        line[0].set_ylabel(f"{shape}\n{layout}\nGB/s", fontsize=8)
        for axes, dtype in zip(line, dtypes, strict=True):
            if (shape, layout, dtype) in panels:
                _draw_panel(axes, panels[shape, layout, dtype])
            else:
                axes.axis("off")
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        axes.set_title(
            dtype.replace("+", " stream, ") + (" sources" if "+" in dtype else ""), fontsize=10
        )
    _legend(figure, [row for panel in panels.values() for row in panel])
    figure.supxlabel(_conditions(next(iter(panels.values()))[0]), fontsize=8)
    return figure


def draw_depth(rows: list[Row]) -> plt.Figure | None:
    """Memory of a step against the number of silos; None without such rows."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    conditions = None
    for row in rows:
        match = re.fullmatch(r"silos-(\d+)", row["op"])
        if match and not row["ms_p50"] and row["peak_mib"]:
            point = int(match[1]), float(row["peak_mib"]), float(row["saved_mib"])
            lines.setdefault(row["provider"], []).append(point)
            conditions = row
    if conditions is None:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    for provider, (color, marker, label) in STEPS.items():
        points = sorted(lines.get(provider, []))
        if points:
            depths, peaks, held = zip(*points, strict=True)
            axes.plot(depths, peaks, color=color, marker=marker, label=f"{label}: peak")
            axes.plot(depths, held, color=color, marker=marker, ls=":", lw=1, ms=4, label="held")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, depths)
    axes.set_xlabel("RevSilos of four levels, widths of S0")
    axes.set_ylabel("MiB above parameters and their gradients")
    axes.grid(lw=0.3)
    axes.legend(fontsize=8, ncols=3, frameon=False, loc="upper left")
    axes.set_ylim(top=axes.get_ylim()[1] * 5)
    row = conditions
    figure.supxlabel(
        f"{row['device']}, torch {row['torch']}, {row['date']}, commit {row['commit']}; "
        f"images {row['shape'].replace('x', '×')}, {row['dtype']}\nsolid: peak of a step, dotted: "
        "held between forward and backward; counted, not sampled",
        fontsize=7,
    )
    return figure


def _conditions(row: Row) -> str:
    versions = f"torch {row['torch']}, triton {row['triton']}"
    return (
        f"{row['device']}, {versions}, {row['date']}, commit {row['commit']}.  "
        "Level 0 fused from ×2, ×4, ×8 sources, bilinear. "
        "GB/s = bytes that must move / median time, higher is better.\n"
        "Above our bars: times faster than eager. "
        "The rivals' inverse is their add, and is not timed again."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR")
    run = parser.parse_args(arguments)
    paths = run.csv or sorted((HERE / "results").glob("*-torch*.csv"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        parser.error(
            f"no such CSV: {', '.join(missing) or HERE / 'results'}; run benchmarks.bench_ops"
        )
    for path in paths:
        rows = read_rows(path)
        figure = draw_ops(rows)
        if figure is not None:
            save(figure, run.output / f"ops-{slug(rows[0]['device'])}")
        figure = draw_depth(rows)
        if figure is not None:
            save(figure, run.output / f"depth-{slug(rows[0]['device'])}")


if __name__ == "__main__":
    main()
