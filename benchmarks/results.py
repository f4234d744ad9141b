"""Writes docs/results.md, the figures and the marked parts of the docs, from the rows alone.

A marked part of README.md or docs/*.md stands between `<!-- begin NAME -->` and its end.
`--check` writes nothing: it names the files that are out of date, and exits with status 1.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .lib import memory_tables, tables
from .lib.markdown import by_device, cell, number, of_mode, ratio, table
from .lib.record import DIRTY, ROOT, Row, git, read_rows

FILES = "memory steps profile ops mbconv host kernels precision published".split()
MARKER = re.compile(r"(<!-- begin ([\w-]+) -->)(.*?)(<!-- end \2 -->)", re.DOTALL)
UNKNOWN = "not measured yet: `make bench-all`"
PAGE = Path("docs") / "results.md"
Rows = dict[str, list[Row]]

TITLE = """# Results

Written by `python -m benchmarks.results` from the CSV files in `benchmarks/results/`; no number is
typed. The line below each table states its conditions. Losses stand beside wins.

- A *step* is forward, backward and update by SGD with momentum. Before timing, the gradients of
  all modes are compared with those of stored activations.
- Times are medians, taken in turns in one run. The 95 % interval of a median lies between two of
  its samples (order statistics, binomial), if samples are independent. On a GPU times are of the
  device alone: a CUDA graph is replayed, or all launches are queued while the device spins, behind
  an emptied L2. A call that cannot be queued as a whole has `launch` in the CSV's column `timed`:
  there the device may have waited for the host. Between cases the GPU rests. *Host ms* is Python's
  time until the call returns; *images/s* are those of a loop, whose pace the slower of device and
  host sets. Rows of the CSV also have, where they were measured, the number of samples, the SM
  clock, the error against float64, and the seconds of compiling.
- *× best rival*: the time of the fastest rival that computes the same and was timed in the same
  run, divided by ours; above 1 ours is faster. *Of peak* is the share of the datasheet's bandwidth.
- *Memory* is on top of parameters, gradients and momentum. *Held* stays between forward and
  backward, *peak* is the most at any moment of a step, *transient* the difference. *Per image* is
  the slope between two batch sizes, so that what does not grow with the batch cancels. Counts on
  fake tensors follow each allocation, and leave out workspaces inside operators; real steps have
  them.
- *GMACs* are multiply-adds of convolutions and matrix products, in 10⁹; those published by the
  authors are `thop`'s, which also counts norms and enlargements.
- *Launches*: kernels on a GPU; on a CPU operators that compute or copy; forward and backward.
- Dropout and stochastic depth are 0 in all networks. EfficientNet and HRNet are timm's; the BiFPN
  is `benchmarks/lib/bifpn.py`, of EfficientDet-D0's shape. *The authors' code* is their repository.
- The paper measured a GPU's allocator, and another EfficientNet; here both are counted alike.
"""
# Commits whose rows of times are from older code.
OLDER_COMMITS = {"461d289", "d58c1f4"}
OLDER = """## {}

Measured before the latest changes of the engine, which calls fewer operators now.
"""
NO_GPU = "## GPU\n\nNot measured yet: no row here is from a GPU.\n"


class Problem(Exception):
    """What keeps the pages from being written, as one message for the user."""


def load(root: Path) -> Rows:
    folder = root / "benchmarks" / "results"
    return {name: read_rows(folder / f"{name}.csv") for name in FILES}


def refuse_dirty(rows: Rows) -> None:
    for name, found in rows.items():
        dirty = sorted({r["commit"] for r in found if r.get("commit", "").endswith(DIRTY)})
        if dirty:
            raise Problem(
                f"benchmarks/results/{name}.csv has rows of uncommitted code ({', '.join(dirty)}): "
                "commit, then measure again"
            )


def foreign_commits(rows: Rows) -> list[str]:
    """Rows whose commit is not in the history of HEAD, a line per file and commit."""
    counts = Counter((name, r["commit"]) for name in rows for r in rows[name] if "commit" in r)
    return [
        f"benchmarks/results/{name}.csv: {count} rows of commit {commit}, which is not in the "
        "history of HEAD"
        for (name, commit), count in counts.items()
        if git("merge-base", "--is-ancestor", commit, "HEAD") is None
    ]


def section(title: str, *parts: str) -> str:
    """Nothing without content."""
    body = "\n".join(part for part in parts if part)
    return f"## {title}\n\n{body}" if body else ""


def page(rows: Rows) -> str:
    """The text of docs/results.md."""
    memory, published = rows["memory"], rows["published"]
    sections = [
        section("The paper's claims", memory_tables.claims_table(memory, published)),
        section(
            "Memory per image", _figure("memory-macs", memory), memory_tables.image_table(memory)
        ),
        section(
            "Memory against depth", _figure("depth", memory), memory_tables.depth_table(memory)
        ),
        section("Memory against the side of the image", memory_tables.side_table(memory)),
        section("Images that fit", memory_tables.largest_table(memory)),
        section("Backbones of detectors", memory_tables.detection_table(memory)),
        section("Counts beside real steps", memory_tables.check_table(memory)),
    ]
    timed = [r for name in ("steps", "profile", "ops", "mbconv", "host") for r in rows[name]]
    for device in dict.fromkeys(row["device"] for row in timed):
        own = {name: [r for r in found if r.get("device") == device]
               for name, found in rows.items()}  # fmt: skip
        sections += timed_sections(own, device)
    kernels = tables.kernels_table(rows["kernels"])
    sections.append(section("What the compiler made of the GPU kernels", kernels))
    traffic = tables.traffic_table(rows["kernels"])
    sections.append(section("Memory traffic of the GPU kernels, counted on a CPU", traffic))
    exact = _figure("round_trip", rows["precision"]), tables.precision_table(rows["precision"])
    sections.append(section("Exact mode", *exact))
    sections.append(section("Training on digits", tables.digits_table(rows["precision"])))
    if not any(row.get("cuda") for row in timed):
        sections.append(NO_GPU)
    return "\n".join([TITLE, *(text for text in sections if text)]).rstrip() + "\n"


def timed_sections(rows: Rows, device: str) -> list[str]:
    steps, ops, mbconv = rows["steps"], rows["ops"], rows["mbconv"]
    figure = _figure("pareto", steps)
    is_old = any(row["commit"] in OLDER_COMMITS for row in (*steps, *ops, *mbconv))
    return [
        OLDER.format(device) if is_old else "",
        section(f"Training steps: {device}", figure, tables.all_steps_table(steps)),
        section("Where reversible is slower", tables.losses_table(steps)),
        section(
            "Where the time of a step goes: ms (share; calls)",
            tables.profile_table(rows["profile"]),
        ),
        section(f"Operators: {device}", tables.ops_table(ops), tables.host_table(ops)),
        section("What follows a convolution, times as fast", tables.norms_table(mbconv)),
        section("Convolutions", tables.convolutions_table(mbconv)),
        section("Forward and backward of each MBConv, fused", tables.blocks_table(mbconv)),
        section("What the host pays", tables.host_page(rows["host"])),
    ]


def _figure(name: str, rows: list[Row]) -> str:
    return f"![{name}](../benchmarks/figures/{name}.png)\n" if rows else ""


def markers(root: Path, rows: Rows) -> dict[str, Callable[[], str]]:
    """What writes each marked part; "" where nothing has been measured."""
    memory, published, precision = rows["memory"], rows["published"], rows["precision"]
    return {
        "step-table": lambda: tables.step_table(rows["steps"]),
        "models-table": lambda: memory_tables.models_table(memory, published),
        "ops-table": lambda: _of_each_device(rows["ops"], tables.ops_table, "S6"),
        "norms-table": lambda: _of_each_device(rows["mbconv"], tables.norms_table),
        "kernels-table": lambda: tables.kernels_table(rows["kernels"], "2+4+8"),
        "precision-table": lambda: tables.precision_table(precision),
        "train-runs": lambda: tables.digits_table(precision),
        "detect-memory": lambda: memory_tables.detection_table(memory),
        "detect-runs": lambda: recorded_table(root, "detect-runs"),
        "depth-conditions": lambda: memory_tables.depth_caption(memory),
        "s0-held": lambda: _per_image(memory, "reversible", "held_mib"),
        "s0-peak": lambda: _per_image(memory, "reversible", "peak_mib"),
        "s0-stored": lambda: _per_image(memory, "stored", "held_mib"),
        "s0-step-ratio": lambda: _step_ratio(rows["steps"], "revbifpn_s0", "reversible", "stored"),
        "s2-step-ratio": lambda: _step_ratio(rows["steps"], "revbifpn_s2", "reversible", "stored"),
        "s0-authors-ratio": lambda: _step_ratio(
            rows["steps"], "revbifpn_s0", "official reversible", "reversible"
        ),
        "s6-b7-ratio": lambda: cell(memory_tables.rival_ratio(memory), 0),
    }


def recorded_table(root: Path, name: str) -> str:
    """Of a CSV recorded by hand: its last column holds the conditions, the same in all rows."""
    rows = read_rows(root / "benchmarks" / "results" / f"{name}.csv")
    if not rows:
        return ""
    *header, last = rows[0]
    lines = [[row[column] for column in header] for row in rows]
    return f"{table(header, lines)}\n*{rows[0][last]}*\n"


def _per_image(memory: list[Row], provider: str, column: str) -> str:
    row = memory_tables.images_of(memory).get(("revbifpn_s0", provider, "fp32"))
    return cell(number(row, column), 1)


def _of_each_device(rows: list[Row], write: Callable[..., str], *more: str) -> str:
    return "\n".join(filter(None, (write(own, *more) for own in by_device(rows).values())))


def _step_ratio(steps: list[Row], name: str, above: str, below: str) -> str:
    """Of one step's time over another's: "1.41 to 1.54" on several devices."""
    found = set()
    for rows in by_device(of_mode(steps, "step")).values():
        times = {r["provider"]: number(r, "ms_p50") for r in rows if r["op"] == name}
        found.add(cell(ratio(times.get(above), times.get(below)), 2))
    known = sorted(filter(None, found), key=float)
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else ""


def filled(text: str, path: Path, writers: dict[str, Callable[[], str]]) -> str:
    """A page with its marked parts written anew."""
    if len(re.findall("<!-- (?:begin|end) ", text)) != 2 * len(MARKER.findall(text)):
        raise Problem(f"{path}: a `<!-- begin NAME -->` without its end, or the other way round")

    def write(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in writers:
            known = ", ".join(sorted(writers))
            raise Problem(f"{path}: nothing writes the marker {name!r}; known are {known}")
        content = writers[name]() or UNKNOWN
        return f"{begin}\n\n{content.rstrip()}\n{end}" if "\n" in content else begin + content + end

    return MARKER.sub(write, text)


def texts(root: Path, rows: Rows) -> dict[Path, str]:
    """What each page should hold, by its path below the root."""
    writers = markers(root, rows)
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    pages = [path.relative_to(root) for path in paths if path.exists()]
    wanted = {path: filled((root / path).read_text(), path, writers)
              for path in pages if path != PAGE}  # fmt: skip
    return wanted | {PAGE: page(rows)}


def is_outdated(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR",
                        help="of benchmarks/results and docs (default: the checkout)")  # fmt: skip
    parser.add_argument("--allow-dirty", action="store_true",
                        help="take rows of uncommitted code too")  # fmt: skip
    run = parser.parse_args(arguments)
    rows = load(run.root)
    try:
        if not run.allow_dirty:
            refuse_dirty(rows)
        wanted = texts(run.root, rows)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    changed = [path for path, text in wanted.items() if is_outdated(run.root / path, text)]
    if run.check:
        for line in foreign_commits(rows):
            print(line)
        for path in changed:
            print(f"{path} is out of date: run `python -m benchmarks.results`", file=sys.stderr)
        return int(bool(changed))
    for path in changed:
        (run.root / path).parent.mkdir(parents=True, exist_ok=True)
        (run.root / path).write_text(wanted[path])
        print(f"page: {run.root / path}")
    from .lib import figures

    figures.draw(run.root / "benchmarks" / "figures", rows["memory"], rows["steps"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
