"""Keeps the record: one CSV per table; each row carries the conditions it was taken under."""

import argparse
import csv
import datetime
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # of autocast
# What a row measures; two rows that agree in all of these are the same measurement.
KEY = "device op provider mode dtype shape layout threads extra_silos target kernel scales".split()
MEASURED_CODE = ("revbifpn_kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results",
                 ":(exclude)benchmarks/figures", ":(exclude)benchmarks/gpu.sh")  # fmt: skip
DIRTY = "+dirty"
FAULTS = ("WRONG", "FAILED")
Row = dict[str, str]


def git(*arguments: str) -> str | None:
    """The output of a git command in the checkout; None if it fails or there is no git."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()


def commit() -> str:
    """Short hash of the checkout, marked if the code that is measured has uncommitted changes.

    Where the code lies without its repository, $BENCH_COMMIT says which commit it is.
    """
    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return os.environ.get("BENCH_COMMIT", "none")
    return head + (DIRTY if git("status", "--porcelain", "--", *MEASURED_CODE) else "")


def cpu_name() -> str:
    """With the instruction set: processors of one name may differ by a factor of two in it."""
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = match.group(1) if match else platform.machine()
    name = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*", " ", name, flags=re.IGNORECASE)
    words = [*name.split(), torch.backends.cpu.get_cpu_capability()]
    if forced := os.environ.get("REVBIFPN_ISA"):
        words.append(f"({forced} forced)")
    return f"{' '.join(words)} {len(os.sched_getaffinity(0))} cores"


def conditions(device: str, command: str) -> Row:
    """What every row of a run shares: date, commit, device, versions, command.

    `device` is cpu, cuda, or anything else for numbers that no device decides.
    """
    names = {"cpu": cpu_name, "cuda": lambda: torch.cuda.get_device_name()}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": names.get(device, lambda: device)(),
        "torch": torch.__version__.split("+")[0],
        "triton": triton.__version__,
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
        "command": command,
    }


def dtype_name(dtype: str) -> str:
    """As it stands in rows; autocast to bfloat16 keeps parameters and streams in float32."""
    return "fp32" if dtype == "fp32" else "fp32+bf16"


def row_of(
    op: str, provider: str, mode: str, dtype: str, shape: Sequence[int], layout: str = "nchw"
) -> Row:
    """The columns that say what was measured; `threads` are those of this moment."""
    sides = "x".join(map(str, shape))
    row = {"op": op, "provider": provider, "mode": mode, "dtype": dtype, "shape": sides}
    return row | {"layout": layout, "threads": str(torch.get_num_threads())}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace a CSV; its columns are those of any row, in the order they appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


@dataclass
class Recorder:
    """Adds the rows of one run to a CSV; a row takes the place of an older one of its key."""

    path: Path
    conditions: Row
    rows: list[Row] = field(default_factory=list)  # of this run

    def add(self, rows: Iterable[Row]) -> None:
        new = [self.conditions | row for row in rows]
        self.rows += new
        merged = {}
        for row in [*read_rows(self.path), *new]:
            key = tuple(row.get(name) or "" for name in KEY)
            merged.pop(key, None)  # so that the newest rows come last
            merged[key] = row
        write_rows(self.path, list(merged.values()))

    def finish(self, table: str) -> int:
        """Print the table and where its rows are; returns the exit status."""
        faults = [row for row in self.rows if row.get("note", "").startswith(FAULTS)]
        print(f"\n{table}\nrows: {self.path}")
        for row in faults:
            print(" ".join(row.get(name, "") for name in ("op", "provider", "mode", "note")))
        return int(bool(faults))


def parser(module: str, description: str, *, on_gpu: bool = True) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    if on_gpu:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument(
        "--quick", action="store_true", help="few and small cases, for a first look"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV",
                        help="where the rows go (default: benchmarks/results)")  # fmt: skip
    return parser


def add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", choices=("nchw", "channels_last"),
                        help="default: nchw on a CPU, channels_last on a GPU")  # fmt: skip


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, refuse what cannot be done here, and note the command for the rows."""
    run = parser.parse_args(arguments)
    if getattr(run, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    if run.output.suffix != ".csv" and run.output.is_file():
        parser.error(f"--output: {run.output} is a file, but neither a folder nor a .csv")
    official = getattr(run, "official", None)
    if official is not None and not any(official.glob("revbifpn*")):
        parser.error(f"--official: {official} is no checkout of the authors' repository")
    if getattr(run, "layout", "") is None:
        run.layout = "channels_last" if run.device == "cuda" else "nchw"
    run.command = shlex.join([*parser.prog.split(), *_public(arguments)])
    return run


def _public(arguments: Sequence[str]) -> list[str]:
    """Without --output, and without the path of the authors' checkout."""
    kept, previous = [], ""
    for argument in arguments:
        if "--output" not in (argument, previous):
            kept.append("DIR" if previous == "--official" else argument)
        previous = argument
    return kept


def recorder(run: argparse.Namespace, table: str, device: str | None = None) -> Recorder:
    """For the rows of `table`.csv in the folder, or in the file, that --output names."""
    path = run.output if run.output.suffix == ".csv" else run.output / f"{table}.csv"
    return Recorder(path, conditions(device or run.device, run.command))
