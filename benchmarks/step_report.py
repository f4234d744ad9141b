"""Writes benchmarks/REPORT.md, tables and figures, from the recorded rows alone.

`python -m benchmarks.step_report`, after bench_memory, bench_step and profile_step.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from .lib import plot_step
from .lib.harness import Row, read_rows, slug
from .lib.plot import FIGURES, save
from .lib.plot_step import GB, MIB, PROVIDERS, conditions, depth_of, number
from .lib.report_text import GRAPHED_STEP, HOW_COUNTED, TITLE

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DTYPE_NAMES = {"fp32": "fp32", "fp32+bf16": "bf16 autocast"}
Lines = list[str]


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> Lines:
    """Markdown; nothing without lines."""
    body = [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *body, ""] if body else []


def section(title: str, *parts: Lines | str) -> Lines:
    """Nothing without content."""
    lines = [line for part in parts for line in ([part, ""] if isinstance(part, str) else part)]
    return [f"## {title}", "", *lines] if any(line.strip() for line in lines) else []


def cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def gigabytes(row: Row | None) -> float | None:
    mib = number(row, "peak_mib") if row else None
    return None if mib is None else mib * MIB / GB


def by_case(rows: Iterable[Row], mode: str) -> dict[tuple[str, str, str], Row]:
    """The rows of a mode, by network, provider and dtype."""
    return {(r["op"], r["provider"], r["dtype"]): r for r in rows if r["mode"] == mode}


def claims(counts: list[Row]) -> Lines:
    """The paper's claims beside what was counted."""
    images = by_case(counts, "an image")
    lines = []
    for dtype, name in DTYPE_NAMES.items():
        ours = gigabytes(images.get(("revbifpn_s6", "reversible", dtype)))
        rival = gigabytes(images.get(("efficientnet_b7", "stored", dtype)))
        if ours and rival:
            paper = ("19.8×", "0.25 GB") if dtype == "fp32" else ("", "")
            what = f"EfficientNet-B7 at 600 over S6 at 352, an image, {name}"
            lines.append((what, f"{rival / ours:.1f}×", paper[0]))
            lines.append((f"S6 at 352, an image, {name}", f"{ours:.3f} GB", paper[1]))
    depth = {depth_of(r): r for r in counts if r["mode"] == "depth"
             and r["provider"] == "reversible"}  # fmt: skip
    if len(depth) > 1:
        few, many = min(depth), max(depth)
        added = (number(depth[many], "saved_mib") - number(depth[few], "saved_mib")) * MIB
        lines.append(("held for each image and added silo, S0",
                      f"{added / (many - few):.0f} bytes", "0"))  # fmt: skip
    return table(("", "counted", "the paper"), lines)


def image_table(counts: list[Row]) -> Lines:
    images = by_case(counts, "an image")
    networks = dict.fromkeys(op for op, _, _ in images)
    lines = []
    for name in sorted(networks):
        first = next(row for key, row in images.items() if key[0] == name)
        sizes = [
            cell(gigabytes(images.get((name, mode, dtype))), 3)
            for dtype in DTYPE_NAMES
            for mode in ("reversible", "stored")
        ]
        macs = number(first, "gflop")
        macs = None if macs is None else macs / 2
        lines.append((name, first["shape"].split("x")[-1], cell(macs), *sizes))
    header = "network,side,GMACs,reversible,stored,reversible bf16,stored bf16".split(",")
    return table(header, lines)


def depth_table(counts: list[Row]) -> Lines:
    rows = [row for row in counts if row["mode"] == "depth"]
    lines = []
    for depth in sorted({depth_of(row) for row in rows}):
        cells = [
            cell(number(row, column), 3)
            for mode in ("reversible", "stored")
            for column in ("saved_mib", "peak_mib")
            for row in rows
            if depth_of(row) == depth and row["provider"] == mode
        ]
        lines.append((depth, *cells))
    return table(("extra silos", "reversible: held MiB", "peak", "stored: held", "peak"), lines)


def side_table(counts: list[Row]) -> Lines:
    rows = [row for row in counts if row["mode"] == "side"]
    sides = sorted({int(row["shape"].split("x")[-1]) for row in rows})
    found = {(r["op"], r["provider"], int(r["shape"].split("x")[-1])): gigabytes(r) for r in rows}
    pairs = sorted({(op, provider) for op, provider, _ in found})
    lines = [(*p, *(cell(found.get((*p, side)), 3) for side in sides)) for p in pairs]
    return table(("network", "mode", *(f"{side} px" for side in sides)), lines)


def largest_table(counts: list[Row]) -> Lines:
    rows = [row for row in counts if row["mode"].startswith("largest")]
    found = {(r["mode"], r["op"], r["provider"], r["dtype"]): r for r in rows}
    cases = sorted({(op, provider, dtype) for _, op, provider, dtype in found})
    modes = sorted({mode for mode, *_ in found})
    lines = [
        (op, provider, DTYPE_NAMES[dtype],
         *(found[mode, op, provider, dtype]["largest"] if (mode, op, provider, dtype) in found
           else "" for mode in modes))
        for op, provider, dtype in cases
    ]  # fmt: skip
    return table(("network", "mode", "dtype", *modes), lines)


def check_table(counts: list[Row], machines: list[list[Row]]) -> Lines:
    """Real steps beside the counts of the same."""
    counted = by_case(counts, "an image")
    lines = []
    for rows in machines:
        for key, real in by_case(rows, "an image").items():
            count = counted.get(key)
            cells = [
                cell(number(row, column))
                for column in ("saved_mib", "peak_mib")
                for row in (count or {}, real)
            ]
            lines.append((*key[:2], DTYPE_NAMES[key[2]], real["device"], *cells))
    header = "network,mode,dtype,device,held MiB counted,real,peak MiB counted,real".split(",")
    return table(header, lines)


def step_table(rows: list[Row]) -> Lines:
    """A training step of each provider; times as shares of the same network's stored."""
    cases = {(r["op"], r["shape"], r["dtype"], r["layout"]) for r in rows if r["mode"] == "step"}
    lines = []
    for case in sorted(case for case in cases if case[0] != "peaks"):
        mine = [r for r in rows if (r["op"], r["shape"], r["dtype"], r["layout"]) == case]
        of_mode = {(r["provider"], r["mode"]): r for r in mine}
        stored = of_mode.get(("stored", "step"), {})
        for (provider, mode), row in of_mode.items():
            if mode != "step":
                continue
            if not row["ms_p50"]:
                lines.append((*case, provider, row["note"], *[""] * 10))
                continue
            times = [number(of_mode.get((provider, m), {}), "ms_p50") for m in ("fwd", "bwd")]
            evaluation = number(of_mode.get((provider, "eval"), {}), "ms_p50")
            step = number(row, "ms_p50")
            state = sum(number(row, f"{k}_mib") for k in ("parameters", "gradients", "optimizer"))
            held, peak = number(row, "saved_mib"), number(row, "peak_mib")
            share = number(row, "share_of_roof")
            lines.append((
                *case, provider, cell(step, 0), cell(ratio(step, number(stored, "ms_p50"))),
                *(cell(ms, 0) for ms in (*times, evaluation)), cell(number(row, "images_per_s"), 1),
                cell(state, 0), cell(held, 1), cell(peak - held, 1), row["operators"],
                f"{share:.1%}",
            ))  # fmt: skip
    header = (
        "network,shape,dtype,layout,mode,step ms,× stored,forward,backward,eval,images/s,"
        "state MiB,held,transient,launches,of the roof"
    ).split(",")
    return table(header, lines)


def losses(rows: list[Row]) -> Lines:
    """Where ours is slower than an alternative that was timed in the same turns."""
    steps = [r for r in rows if r["mode"] == "step" and r.get("ms_p50")]
    ours = {(r["op"], r["shape"], r["dtype"], r["layout"]): r for r in steps
            if r["provider"] == "reversible"}  # fmt: skip
    lines = []
    for key, mine in ours.items():
        for rival in steps:
            same_network = (rival["op"], rival["shape"], rival["dtype"], rival["layout"]) == key
            if not same_network or float(rival["ms_p50"]) >= float(mine["ms_p50"]):
                continue
            times = ratio(number(mine, "ms_p50"), number(rival, "ms_p50"))
            memory = ratio(number(rival, "peak_mib"), number(mine, "peak_mib"))
            lines.append((key[0], key[1], DTYPE_NAMES[key[2]], rival["provider"],
                          f"{times:.2f}×", f"{memory:.1f}×"))  # fmt: skip
    header = ("network", "shape", "dtype", "faster than reversible", "our time over its",
              "its peak memory over ours")  # fmt: skip
    return table(header, lines)


def largest_steps(rows: list[Row]) -> Lines:
    lines = [
        (r["op"], r["provider"], DTYPE_NAMES[r["dtype"]], r["shape"],
         r["images_per_s"] or r["note"], cell(number(r, "peak_mib"), 0))
        for r in rows
        if r["mode"] == "largest"
    ]  # fmt: skip
    return table(("network", "mode", "dtype", "largest batch", "images/s", "peak MiB"), lines)


def profile_tables(rows: list[Row]) -> Lines:
    """A table a network: milliseconds (share of the step, calls) of each kind and level."""
    found = [row for row in rows if row["mode"].startswith("profile, ")]
    lines: Lines = []
    for name in dict.fromkeys(row["op"] for row in found):
        mine = [row for row in found if row["op"] == name]
        providers = list(dict.fromkeys(row["provider"] for row in mine))
        by_part = {(r["mode"].removeprefix("profile, "), r["provider"]): r for r in mine}
        parts = dict.fromkeys(part for part, _ in by_part)

        def share(part: str, provider: str, by_part=by_part) -> str:
            row, whole = by_part.get((part, provider)), by_part["all", provider]
            if row is None:
                return ""
            of_all = number(row, "ms_p50") / number(whole, "ms_p50")
            return f"{number(row, 'ms_p50'):.0f} ({of_all:.0%}; {row['operators']})"

        lines += table(
            (f"{name}, {mine[0]['shape']}, {DTYPE_NAMES[mine[0]['dtype']]}", *providers),
            ([part, *(share(part, provider) for provider in providers)] for part in parts),
        )
    return lines


def picture(figure, name: str, output: Path) -> Lines:
    """Draw it and show it; nothing if there was nothing to draw."""
    if figure is None:
        return []
    save(figure, output / name)
    return [f"![{name}](figures/{name}.png)", ""]


def memory_sections(counts: list[Row], machines: list[list[Row]], figures: Path) -> Lines:
    return [
        *section("The paper's claims", claims(counts)),
        *section(
            "What an image adds, GB at the peak",
            picture(plot_step.draw_memory(counts), "memory-macs", figures),
            image_table(counts),
        ),
        *section(
            "Against depth",
            picture(plot_step.draw_depth(counts), "memory-depth", figures),
            depth_table(counts),
        ),
        *section("Against the side, GB an image, fp32", side_table(counts)),
        *section("The largest batch, and the largest side of one image", largest_table(counts)),
        *section("Counts beside real steps, an image", check_table(counts, machines)),
    ]


def machine_sections(rows: list[Row], figures: Path) -> Lines:
    steps = [r for r in rows if r["mode"] == "step" and r["op"] != "peaks" and "share_of_roof" in r]
    steps = [r for r in steps if r["gflop"] or r["note"].startswith(("WRONG", "FAILED", "out of"))]
    profiled = profile_tables(rows)
    if not steps and not profiled:
        return []
    first = next(row for row in [*steps, *rows] if row["device"])
    name = slug(first["device"])
    peaks = [row for row in rows if row["op"] == "peaks" and row["dtype"] == first["dtype"]]
    ours = [r for r in steps if r["provider"] in PROVIDERS and r["dtype"] == first["dtype"]]
    pareto, roofline = plot_step.draw_pareto(ours), plot_step.draw_roofline(ours, peaks)
    timed = [row for row in rows if row["op"] in {s["op"] for s in steps}]
    return [
        *section(f"Training steps: {conditions(first)}", step_table(timed)),
        *section("Time against memory", picture(pareto, f"pareto-{name}", figures)),
        *section("Roofline", picture(roofline, f"roofline-{name}", figures)),
        *section("Where reversible is slower", losses(steps)),
        *section("At the largest batch", largest_steps(rows)),
        *section(
            "Where a step's time goes: ms (share; calls)",
            "One thread on a CPU, in its processor time.",
            profiled,
        ),
    ]


def report(folder: Path, figures: Path) -> str:
    counts_path = folder / "memory.csv"
    counts = read_rows(counts_path) if counts_path.exists() else []
    machines = [read_rows(path) for path in sorted(folder.glob("*-torch*.csv"))]
    lines = [TITLE, HOW_COUNTED, *memory_sections(counts, machines, figures)]
    for rows in machines:
        lines += machine_sections(rows, figures)
    if not any(row["cuda"] for rows in machines for row in rows):
        lines += section("GPU", "Not measured yet: no row here is from one. " + GRAPHED_STEP)
    else:
        lines += section("CUDA graph of a step", GRAPHED_STEP)
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="DIR")
    parser.add_argument("--output", type=Path, default=HERE / "REPORT.md", metavar="FILE")
    run = parser.parse_args(arguments)
    if not any(run.results.glob("*.csv")):
        parser.error(f"no CSV in {run.results}; run benchmarks.bench_step or bench_memory first")
    run.output.write_text(report(run.results, run.figures))
    print(f"report: {run.output}")


if __name__ == "__main__":
    main()
