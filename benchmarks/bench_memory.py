"""Training memory as the paper measures it: what a step takes per image of its batch.

Counts every allocation of a step on fake tensors, so the numbers hold for any machine: per image
for all networks, against depth, against the side, and of backbones of detectors. Real steps check
the counts: of S0 on a CPU, of all networks on a GPU, by its allocator.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch
from tqdm import tqdm

from revbifpn_kernels import SIZES, macs

from .lib import memory, memory_tables, record
from .lib.memory import held_and_peak, per_image, slope
from .lib.networks import NETWORKS, PROVIDERS, fake_network
from .lib.operators import gmacs
from .lib.record import DTYPES, Row, dtype_name
from .lib.step import Step

EXTRA_SILOS = (2, 4, 8, 16)
# The engine saves a batch norm's statistics, bytes per channel, where its map is large; from this
# batch on all are, so that none becomes so between a batch and twice that.
MANY = 128
SIDES = (256, 1024)
LARGE = (  # whose memory is counted against the side
    ("revbifpn_s6", "reversible"),
    ("revbifpn_s6", "stored"),
    ("efficientnet_b7", "stored"),
    ("hrnet_w48", "stored"),
)
PARTS = ("images", "depth", "sides", "detection", "real")


def providers_of(name: str) -> tuple[str, ...]:
    return ("reversible", "stored") if name in SIZES else ("stored",)


def row_of(name: str, provider: str, mode: str, side: int, dtype: str = "fp32") -> Row:
    row = record.row_of(name, provider, mode, dtype_name(dtype), (1, 3, side, side))
    return {column: text for column, text in row.items() if column != "threads"}


def image_row(name: str, provider: str, dtype: str) -> Row:
    net, side = fake_network(name, provider), NETWORKS[name].side
    row = row_of(name, provider, "per image", side, dtype)
    row |= per_image(net, side, DTYPES[dtype]).columns()
    if dtype == "fp32":
        row["gmacs"] = f"{gmacs(fake_network(name), side):.4f}"
        row["parameters"] = str(sum(p.numel() for p in net.parameters()))
        if name in SIZES:
            row["published_macs"] = str(macs(net, side).official)
    return row


def depth_row(provider: str, extra: int) -> Row:
    side = NETWORKS["revbifpn_s0"].side
    net = fake_network("revbifpn_s0", provider, extra_silos=extra)
    row = row_of("revbifpn_s0", provider, "depth", side) | {"extra_silos": str(extra)}
    return row | per_image(net, side, images=MANY).columns()


def side_row(name: str, provider: str, side: int) -> Row:
    counted = per_image(fake_network(name, provider), side)
    return row_of(name, provider, "side", side) | counted.columns()


def detection_rows() -> list[Row]:
    """What the detection command counts of its backbones and of the usual ones."""
    from revbifpn_kernels.recipes.detect.memory import candidates, measured
    from revbifpn_kernels.recipes.detect.options import parse

    options, rows = parse(["--memory"]), []
    for name, make in candidates(options):
        net = make()
        held, peak = measured(net, options.image_size, None)
        row = row_of(name, "", "detection", options.image_size)
        row["parameters"] = str(sum(p.numel() for p in net.parameters()))
        rows.append(row | {"held_mib": f"{held:.1f}", "peak_mib": f"{peak:.1f}"})
    return rows


def jobs_of(run: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """One per row; they share nothing. The longest come first, so that no core waits at the end."""
    if "depth" in run.parts:
        for extra in reversed(EXTRA_SILOS[: 2 if run.quick else None]):
            for provider in ("checkpoint", "reversible", "stored"):
                yield partial(depth_row, provider, extra)
    if "images" in run.parts:
        for name in run.models:
            for provider in providers_of(name):
                for dtype in DTYPES:
                    yield partial(image_row, name, provider, dtype)
    if "sides" in run.parts:
        for name, provider in LARGE:
            for side in SIDES:
                yield partial(side_row, name, provider, side)


def count(run: argparse.Namespace) -> record.Recorder:
    """All jobs, side by side: a count is Python on one core."""
    rows = record.recorder(run, "memory", "counted")
    # Spawned, because the threads of a process that has used PyTorch do not survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(run.workers, spawn, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.submit(job) for job in jobs_of(run)]
        for done in tqdm(as_completed(waiting), total=len(waiting), unit="count", disable=None):
            rows.add([done.result()])
    if "detection" in run.parts:
        rows.add(detection_rows())
    return rows


def real_row(name: str, provider: str, dtype: str, device: str) -> Row:
    """What a count claims, of real steps."""
    side = NETWORKS[name].side
    net = PROVIDERS[provider](NETWORKS[name].make()).to(device)

    def measure(batch: int) -> tuple[int, int]:
        step = Step(net, torch.randn(batch, 3, side, side, device=device), DTYPES[dtype])
        step()  # gradients and the optimizer's state come into being
        return held_and_peak(step.forward, device)

    measured = slope(net, measure(2), measure(4))
    return row_of(name, provider, "real", side, dtype) | measured.columns()


def measure(run: argparse.Namespace) -> record.Recorder:
    is_gpu = run.device == "cuda"
    rows = record.recorder(run, "memory")
    for name in run.models if is_gpu else ["revbifpn_s0"]:
        for provider in providers_of(name):
            for dtype in DTYPES if is_gpu else ("fp32",):
                try:
                    row = real_row(name, provider, dtype, run.device)
                except RuntimeError as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    row = row_of(name, provider, "real", NETWORKS[name].side, dtype)
                    row["note"] = "out of memory"
                rows.add([row])
                gc.collect()
    return rows


def main(arguments: list[str]) -> int:
    parser = record.parser("bench_memory", __doc__)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    run = record.parse(parser, arguments)
    real = measure(run).rows if "real" in run.parts else []
    rows = count(run)
    rows.rows += real
    return rows.finish(memory_tables.all_tables(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
