"""Training memory as the paper measures it: what one more image of a batch adds.

`python -m benchmarks.bench_memory` counts every allocation of a step on fake tensors: an image's
share for all networks, against depth, against the side, and the largest batch and side that fit.
The counts hold for any machine and go to results/memory.csv. Real steps check them: of S0 on a CPU,
of all networks on a GPU, by its allocator; those go to the machine's CSV.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from .lib import harness
from .lib.counts import PerImage, fake_network, largest_side, per_image, slope
from .lib.harness import MIB, Row
from .lib.memory import held_and_peak
from .lib.rivals import NETWORKS, PROVIDERS
from .lib.roofline import work_of
from .lib.training import Step

RESULTS = Path(__file__).parent / "results"
COUNTS = "memory.csv"
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
EXTRA_SILOS = (2, 4, 8, 16, 32, 64)
# The engine keeps a batch norm's statistics, bytes a channel, where its map is large; from this
# batch on all are, so that none becomes so between a batch and twice that.
MANY = 128
SIDES = (256, 512, 1024, 2048)
LARGE = (  # whose largest batch and side are looked for, and memory against the side
    ("revbifpn_s6", "reversible"),
    ("revbifpn_s6", "stored"),
    ("efficientnet_b7", "stored"),
    ("hrnet_w48", "stored"),
)
PARTS = ("images", "depth", "sides", "largest", "real")
VERSIONS = ("date", "commit", "torch")  # all that a count depends on
Job = Callable[[], Row]


def providers_of(name: str) -> tuple[str, ...]:
    is_ours = NETWORKS[name].family == "RevBiFPN"
    return ("reversible", "stored") if is_ours else ("stored",)


def image_row(name: str, provider: str, side: int, dtype: str) -> Row:
    counted = per_image(name, provider, side, DTYPES[dtype])
    flop = sum(
        work.flop for work in work_of(fake_network(name), (1, 3, side, side), training=False)
    )
    columns = {"gflop": f"{flop / 1e9:.3f}", "note": "gflop: of an evaluation"}
    return row_of(name, provider, "an image", side, dtype) | memory_columns(counted) | columns


def depth_row(provider: str, extra: int) -> Row:
    side = NETWORKS["revbifpn_s0"].side
    counted = per_image("revbifpn_s0", provider, side, extra_silos=extra, images=MANY)
    name = f"revbifpn_s0 with {extra} extra silos"
    return row_of(name, provider, "depth", side, "fp32") | memory_columns(counted)


def side_row(name: str, provider: str, side: int) -> Row:
    counted = per_image(name, provider, side)
    return row_of(name, provider, "side", side, "fp32") | memory_columns(counted)


def largest_batch_row(name: str, provider: str, dtype: str, gib: float) -> Row:
    side = NETWORKS[name].side
    counted = per_image(name, provider, side, DTYPES[dtype])
    row = row_of(name, provider, f"largest batch in {gib:g} GiB", side, dtype)
    return row | {"largest": str(counted.batch_in(int(gib * 2**30)))}


def largest_side_row(name: str, provider: str, dtype: str, gib: float) -> Row:
    side = largest_side(name, provider, int(gib * 2**30), DTYPES[dtype])
    row = row_of(name, provider, f"largest side in {gib:g} GiB", side, dtype)
    return row | {"shape": "1x3xSxS", "largest": str(side)}


def row_of(name: str, provider: str, mode: str, side: int, dtype: str) -> Row:
    return {
        "op": name,
        "provider": provider,
        "mode": mode,
        "dtype": "fp32" if dtype == "fp32" else "fp32+bf16",
        "shape": f"1x3x{side}x{side}",
        "layout": "nchw",
    }


def memory_columns(counted: PerImage) -> Row:
    return {
        "saved_mib": f"{counted.held / MIB:.4f}",
        "peak_mib": f"{counted.peak / MIB:.4f}",
        "parameters_mib": f"{counted.parameters / MIB:.3f}",
    }


def jobs_of(run: argparse.Namespace) -> Iterator[Job]:
    """One a row; they share nothing."""
    pairs = [(name, provider) for name in run.models for provider in providers_of(name)]
    if "images" in run.parts:
        for dtype in DTYPES:
            for name, provider in pairs:
                yield partial(image_row, name, provider, NETWORKS[name].side, dtype)
    if "depth" in run.parts:
        for extra in EXTRA_SILOS:
            for provider in ("reversible", "stored"):
                yield partial(depth_row, provider, extra)
    if "sides" in run.parts:
        for name, provider in LARGE:
            for side in SIDES:
                yield partial(side_row, name, provider, side)
    if "largest" in run.parts:
        for name, provider in LARGE:
            for dtype in DTYPES:
                yield partial(largest_batch_row, name, provider, dtype, run.memory)
                yield partial(largest_side_row, name, provider, dtype, run.memory)


def measured_row(name: str, provider: str, dtype: str, device: str) -> Row:
    """What a count claims, of real steps."""
    side = NETWORKS[name].side
    net = PROVIDERS[provider](NETWORKS[name].make()).to(device)

    def measure(batch: int) -> tuple[int, int]:
        step = Step(net, torch.randn(batch, 3, side, side, device=device), DTYPES[dtype])
        step()  # gradients and the optimizer's state come into being
        return held_and_peak(step.forward, device)

    measured = slope(net, measure(2), measure(4))
    return row_of(name, provider, "an image", side, dtype) | memory_columns(measured)


def measure(run: argparse.Namespace) -> list[Row]:
    is_gpu = run.device == "cuda"
    names = run.models if is_gpu else ["revbifpn_s0"]
    machine = harness.describe_machine(run.device)
    path = harness.result_path(run.output, machine)
    rows = []
    for name in names:
        for provider in providers_of(name):
            for dtype in DTYPES if is_gpu else ("fp32",):
                rows.append(machine | {"threads": str(torch.get_num_threads())})
                try:
                    rows[-1] |= measured_row(name, provider, dtype, run.device)
                except RuntimeError as error:
                    if not harness.is_out_of_memory(error):
                        raise
                    rows[-1] |= row_of(name, provider, "an image", NETWORKS[name].side, dtype)
                    rows[-1] |= {"note": "out of memory"}
                gc.collect()
                harness.record(path, rows)
                show(rows[-1])
    return rows


def count(run: argparse.Namespace) -> list[Row]:
    """All jobs, side by side: a count is Python on one core."""
    commit = {k: v for k, v in harness.describe_machine("cpu").items() if k in VERSIONS}
    path = run.output if run.output.suffix == ".csv" else run.output / COUNTS
    rows: list[Row] = []
    # Spawned, because the threads of a process that has used PyTorch do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(run.workers, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(job) for job in jobs_of(run)]):
            rows.append(commit | {"device": "counted"} | done.result())
            harness.record(path, rows[-1:])
            show(rows[-1])
    return rows


def show(row: Row) -> None:
    cells = [row.get(k, "") for k in "op provider mode dtype shape".split()]
    for column in ("saved_mib", "peak_mib"):
        cells.append(f"{float(row[column]):.2f}" if row.get(column) else "")
    cells += [row.get("largest", ""), row.get("note", "")]
    line = "{:36}{:12}{:26}{:10}{:>16}{:>11}{:>11}{:>8}  {}"
    print(line.format(*cells).rstrip(), flush=True)


def memory_gib(device: str) -> float:
    """Of the GPU, or of this machine; in whole GiB, as it is spoken of."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory >> 30)
    return float((os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) >> 30)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_memory", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found, help="of real steps")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--memory", type=float, metavar="GIB", help="default: this machine's")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    run.memory = run.memory or memory_gib(run.device)
    return run


def main(arguments: list[str] | None = None) -> int:
    run = parse(arguments)
    print("MiB that an image adds: held between forward and backward, and at the peak of a step")
    if "real" in run.parts:
        measure(run)
    count(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
