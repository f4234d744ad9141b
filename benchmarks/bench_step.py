"""Training steps of whole networks, ours in every mode beside what a user would pick instead.

`python -m benchmarks.bench_step` compares gradients first, takes times in turns, counts memory
exactly (CPU) or by the allocator (GPU), and adds its rows to the machine's CSV. `--official DIR`,
a checkout of the authors' repository, which is imported from there and is no part of ours, adds
their network with the same weights.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .lib import harness, rivals
from .lib.counts import fake_network, largest_batch
from .lib.harness import MIB, Row, Timing
from .lib.operators import launches
from .lib.rivals import NETWORKS
from .lib.roofline import Peaks, Work, measure_peaks, work_of
from .lib.training import Split, Step, memory_of

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
FILLED = 0.85  # of a GPU, by the largest batch: fragments and workspaces need the rest
MOST_IMAGES = 2048  # of a batch: images a second have levelled off long before
# Network of ours → batch, and the rivals that are timed in its turns.
ON_CPU = {
    "revbifpn_s0": (4, ("efficientnet_b0", "hrnet_w18", "bifpn_b0")),
    "revbifpn_s2": (4, ("efficientnet_b1",)),
}
ON_GPU = {
    "revbifpn_s0": (128, ("efficientnet_b0", "hrnet_w18", "bifpn_b0")),
    "revbifpn_s4": (32, ("efficientnet_b4", "hrnet_w48")),
    "revbifpn_s6": (16, ("efficientnet_b7",)),
}


@dataclass
class Contender:
    """A network in one way to train it; out of the race with its first note."""

    network: str
    provider: str
    side: int
    batch: int
    net: nn.Module
    note: str = ""
    step: Step | None = None
    split: Split | None = None
    launches: int | None = None
    times: dict[str, Timing] = field(default_factory=dict)

    def attempt(self, call: Callable[[], object]) -> None:
        """Note where memory ran out, or the compiler gave up."""
        if self.note:
            return
        try:
            call()
        except Exception as error:
            is_full = harness.is_out_of_memory(error)
            failure = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
            self.note = "out of memory" if is_full else failure[:120]
            self.step = None
        if self.note:
            _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def contenders_of(name: str, run, providers, batch: int, official: Path | None) -> list[Contender]:
    """The network in each of these ways; the side is its own unless one is asked for."""
    side = run.side or NETWORKS[name].side
    nets = rivals.providers_of(name, providers, official)
    return [Contender(name, key, side, batch, net) for key, net in nets.items()]


def prepare(contender: Contender, run: argparse.Namespace) -> None:
    layout = torch.channels_last if run.layout == "channels_last" else torch.contiguous_format
    net = contender.net.to(run.device, memory_format=layout)
    torch.manual_seed(0)
    image = torch.randn(contender.batch, 3, contender.side, contender.side)
    image = image.to(run.device, memory_format=layout)
    contender.step = Step(net, image, DTYPES[run.dtype])
    contender.step()


def check(contenders: list[Contender], dtype: str) -> None:
    """Take those out whose gradients are far from the same network's with stored activations."""
    expected = {
        c.network: rivals.gradients(c.net)
        for c in contenders
        if c.provider == "stored" and not c.note
    }
    for contender in contenders:
        if contender.note or contender.network not in expected:
            continue
        right = expected[contender.network]
        error = ((rivals.gradients(contender.net) - right).norm() / right.norm()).item()
        # bfloat16 and the lattice round the function itself.
        bound = 0.3 if dtype == "bf16" else 0.03 if contender.provider == "exact" else 1e-3
        if not error < bound:
            contender.note = f"WRONG: gradients differ by {error:.2g}"


def bench(contenders: list[Contender], run, seconds: float) -> None:
    """Check, measure memory, time steps and evaluations in turns; findings go to the contenders."""
    for contender in contenders:
        contender.attempt(lambda c=contender: prepare(c, run))
    check(contenders, run.dtype)
    for contender in contenders:
        contender.attempt(lambda c=contender: measure(c, run.device))
    running = {(c.network, c.provider): c for c in contenders if not c.note}
    steps = {key: c.step for key, c in running.items()}
    time_in_turns = functools.partial(harness.measure_interleaved, clock=run.clock)
    times = time_in_turns(steps, seconds=0.8 * seconds, rounds=(5, 40))
    for key, contender in running.items():
        contender.times = contender.step.phases() | {"step": times[key]}
        contender.step.net.eval()
    evaluations = {key: step.evaluate for key, step in steps.items()}
    for call in evaluations.values():
        call()
    times = time_in_turns(evaluations, seconds=0.2 * seconds, rounds=(5, 40))
    for key, contender in running.items():
        contender.times["eval"] = times[key]


def measure(contender: Contender, device: str) -> None:
    """Memory and launches, of forward and backward alone: updates are as in any network."""
    step = contender.step
    contender.split = memory_of(step)
    contender.launches = launches(lambda: step.forward().backward(), device)
    step.marks.clear()
    step()  # the step that warms up, see Step.phases


def rows_of(contender: Contender, mode: str, run, machine: Row, peaks: Peaks) -> list[Row]:
    """A row a phase; one of `mode` with the note of what kept it out."""
    row = row_of(contender, run, machine)
    if contender.note:
        return [row | {"mode": mode, "note": contender.note}]
    rows = []
    for mode, timing in contender.times.items():
        rows.append(row | {"mode": mode} | _time_columns(timing))
        if mode in ("step", "eval", "largest"):
            rows[-1]["images_per_s"] = f"{contender.batch / timing.p50 * 1e3:.2f}"
        if mode in ("step", "largest"):
            rows[-1] |= _memory_columns(contender)
            rows[-1] |= _roof_columns(contender, run, peaks, timing)
    return rows


def _time_columns(timing: Timing) -> Row:
    return {f"ms_{name}": f"{getattr(timing, name):.3f}" for name in ("p20", "p50", "p80")}


def _memory_columns(contender: Contender) -> Row:
    split = contender.split
    columns = {
        "parameters_mib": split.parameters,
        "gradients_mib": split.gradients,
        "optimizer_mib": split.optimizer,
        "saved_mib": split.held,
        "peak_mib": split.peak,
    }
    sizes = {name: f"{size / MIB:.2f}" for name, size in columns.items()}
    return sizes | {"operators": str(contender.launches or "")}


def _roof_columns(contender: Contender, run, peaks: Peaks, timing: Timing) -> Row:
    shape = (contender.batch, 3, contender.side, contender.side)
    work = _work(contender.network, shape, DTYPES[run.dtype])
    return {
        "gflop": f"{sum(w.flop for w in work) / 1e9:.3f}",
        "traffic_mib": f"{sum(w.traffic for w in work) / MIB:.1f}",
        "share_of_roof": f"{peaks.roof_ms(work) / timing.p50:.4f}",
    }


@functools.cache
def _work(network: str, shape: tuple[int, ...], autocast: torch.dtype | None) -> list[Work]:
    return work_of(fake_network(network), shape, autocast=autocast)


def row_of(contender: Contender, run, machine: Row) -> Row:
    return {
        **machine,
        "op": contender.network,
        "provider": contender.provider,
        "dtype": "fp32" if run.dtype == "fp32" else "fp32+bf16",
        "shape": f"{contender.batch}x3x{contender.side}x{contender.side}",
        "layout": "nchw" if run.layout == "nchw" else "channels_last",
        "threads": str(torch.get_num_threads()),
        "note": "",
    }


def peak_rows(peaks: Peaks, run, machine: Row) -> list[Row]:
    """What the roofline was measured to be, in the same run."""
    base = {**machine, "op": "peaks", "mode": "step", "layout": "nchw"}
    base |= {"dtype": "fp32" if run.dtype == "fp32" else "fp32+bf16"}
    base |= {"threads": str(torch.get_num_threads()), "note": "measured"}
    return [
        base | {"provider": "matmul", "gflop": f"{peaks.flops / 1e9:.1f}", "note": "GFLOP/s"},
        base | {"provider": "copy", "gbps": f"{peaks.bandwidth / 1e9:.2f}"},
    ]


def bench_largest(name: str, provider: str, run) -> list[Contender]:
    """Steps of the largest batch that this mode is counted to hold, without rivals beside it."""
    side = run.side or NETWORKS[name].side
    budget = int(run.memory * 2**30)
    batch = largest_batch(name, provider, side, budget, DTYPES[run.dtype])
    (contender,) = contenders_of(name, run, (provider,), min(batch, MOST_IMAGES), None)
    contender.note = "" if batch else "out of memory"
    contender.attempt(lambda: prepare(contender, run))
    contender.attempt(lambda: time_alone(contender, run))
    return [contender]


def time_alone(contender: Contender, run) -> None:
    contender.split = memory_of(contender.step)
    only = {"largest": contender.step}
    contender.times = harness.measure_interleaved(only, run.clock, seconds=1.0, rounds=(3, 10))


def bench_group(name: str, run, providers, others, seconds: float) -> list[Contender]:
    """A network of ours in all modes in turns with the networks beside it."""
    batch = run.batch or (ON_GPU if run.device == "cuda" else ON_CPU).get(name, (4, ()))[0]
    official = None if others is None else run.official
    contenders = contenders_of(name, run, providers, batch, official)
    for other in others or ():
        contenders += contenders_of(other, run, ("stored",), batch, None)
    bench(contenders, run, seconds)
    return contenders


def jobs_of(run: argparse.Namespace) -> list[tuple[str, Callable[[], list[Contender]]]]:
    """What to run, by its mode; the compiler takes minutes, so what it makes comes last."""
    table = ON_GPU if run.device == "cuda" else ON_CPU
    share = run.seconds / max(len(run.models) + len(run.compile), 1)
    jobs = []
    for name in run.models:
        others = table.get(name, (4, ()))[1] if run.rivals is None else run.rivals
        args = (name, run, run.providers, others, share)
        jobs.append(("step", functools.partial(bench_group, *args)))
    for name in run.models if run.memory else ():
        for provider in ("reversible", "stored"):
            jobs.append(("largest", functools.partial(bench_largest, name, provider, run)))
    providers = ("reversible", "stored", *rivals.COMPILED)
    for name in run.compile:
        args = (name, run, providers, None, share)
        jobs.append(("step", functools.partial(bench_group, *args)))
    return jobs


def table(rows: list[Row]) -> None:
    header = "network provider mode shape dtype ms img/s held peak launches roof note".split()
    line = "{:16}{:20}{:8}{:>14} {:10}{:>10}{:>9}{:>9}{:>9}{:>9}{:>7}  {}"
    print(line.format(*header))
    for row in rows:
        if row["mode"] == "update":
            continue
        names = "op provider mode shape dtype ms_p50 images_per_s saved_mib peak_mib operators"
        cells = [row.get(k, "") for k in [*names.split(), "share_of_roof", "note"]]
        print(line.format(*cells))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument("--models", nargs="*", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--rivals", nargs="*", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--providers", nargs="+", choices=rivals.PROVIDERS, default=rivals.EAGER)
    parser.add_argument("--compile", nargs="*", choices=NETWORKS, metavar="NAME",
                        help="networks to compile too; minutes each on a CPU")  # fmt: skip
    parser.add_argument("--batch", type=int)
    parser.add_argument("--side", type=int, help="default: 224 on a CPU, each network's own on GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 is autocast")
    parser.add_argument("--layout", choices=("nchw", "channels_last"), default="nchw")
    parser.add_argument("--memory", type=float, metavar="GIB",
                        help="time the largest batches in it; default: a GPU's own")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing, in all")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    _fill_defaults(run)
    return run


def _fill_defaults(run: argparse.Namespace) -> None:
    is_gpu = run.device == "cuda"
    if run.models is None:
        run.models = list(ON_GPU if is_gpu else ON_CPU)
    if run.compile is None:
        run.compile = ["revbifpn_s0"] if is_gpu else []
    run.side = run.side or (None if is_gpu else 224)
    run.dtype = run.dtype or ("bf16" if is_gpu else "fp32")
    if run.memory is None and is_gpu:
        run.memory = FILLED * torch.cuda.get_device_properties(0).total_memory / 2**30
    if run.threads:
        torch.set_num_threads(run.threads)
    run.clock = harness.clock_for(run.device)


def main(arguments: list[str] | None = None) -> int:
    run = parse(arguments)
    machine = harness.describe_machine(run.device)
    path = harness.result_path(run.output, machine)
    peaks = measure_peaks(run.device, DTYPES[run.dtype] or torch.float32, run.clock)
    rows = peak_rows(peaks, run, machine)
    harness.record(path, rows)
    for mode, job in jobs_of(run):
        contenders = job()
        new = [row for c in contenders for row in rows_of(c, mode, run, machine, peaks)]
        del contenders
        _release()
        harness.record(path, new)
        table(new)
        rows += new
    print(f"rows: {path}")
    return int(any(row["note"].startswith(("WRONG", "FAILED")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
