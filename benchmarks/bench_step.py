"""Training steps of whole networks, ours in every mode beside what a user would pick instead.

Compares gradients first, takes times in turns, counts memory exactly (CPU) or by the allocator
(GPU). On a GPU a network is also timed as one CUDA graph; images per second are those of a loop,
whose pace the slower of device and host sets. `--official DIR`, a checkout of the authors'
repository, which is imported from there and is no part of ours, adds their network with the same
weights.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .lib import clocks, memory, networks, record, tables, timing
from .lib.networks import NETWORKS
from .lib.operators import launches
from .lib.record import DTYPES, Row
from .lib.step import Step, step_of
from .lib.timing import Timing

# Network of ours → batch, and the rivals that are timed in its turns.
ON_CPU = {
    "revbifpn_s0": (4, ("efficientnet_b0", "hrnet_w18", "bifpn_b0")),
    "revbifpn_s2": (4, ()),
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
    first_s: float | None = None  # of the first step, if it compiled
    graphs: dict = field(default_factory=dict)  # CUDA graphs of step and evaluation, by mode
    measured: Row = field(default_factory=dict)  # memory and launches, columns of its row
    times: dict[str, Timing] = field(default_factory=dict)

    @property
    def has_graph(self) -> bool:
        return self.provider.endswith(networks.GRAPH)

    def call(self, mode: str) -> Callable[[], object]:
        """What is timed in a mode, `step` or `eval`."""
        if self.has_graph:
            return self.graphs[mode].replay
        return self.step if mode == "step" else self.step.evaluate

    def capture(self, mode: str, others: list["Contender"]) -> None:
        """Into the memory of the others' graphs: only one runs at a time."""
        pool = next((g.pool() for c in others for g in c.graphs.values()), None)
        call = self.step if mode == "step" else self.step.evaluate
        self.graphs[mode] = clocks.capture(call, pool=pool)

    def attempt(self, call: Callable[[], object]) -> None:
        """Note where memory ran out, or the compiler gave up."""
        if self.note:
            return
        try:
            call()
        except Exception as error:
            is_full = memory.is_out_of_memory(error)
            is_known = isinstance(error, clocks.NotCaptured)
            failure = str(error) if is_known else f"FAILED: {type(error).__name__}: {error}"
            self.note = "out of memory" if is_full else failure.splitlines()[0][:120]
            self.step = None
            self.graphs.clear()
        if self.note:
            _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def contenders_of(name: str, run, providers, batch: int, official: Path | None) -> list[Contender]:
    """The network in each of these ways; the side is its own unless one is asked for."""
    side = run.side or NETWORKS[name].side
    nets = networks.providers_of(name, providers, official)
    return [Contender(name, key, side, batch, net) for key, net in nets.items()]


def prepare(contender: Contender, others: list[Contender], run: argparse.Namespace) -> None:
    """The first step; captures it if that is what is timed, and counts what the graph holds."""
    torch.manual_seed(0)
    image = torch.randn(contender.batch, 3, contender.side, contender.side)
    contender.step = step_of(contender.net, image, run)
    first_s = run.clock.wall_s(contender.step)
    if run.device == "cuda" or contender.provider in networks.COMPILED:
        contender.first_s = first_s
    if contender.has_graph:
        peak = memory.peak_mib(lambda: contender.capture("step", others), run.device)
        contender.measured = {"peak_mib": f"{peak:.2f}"}


def check(contenders: list[Contender], dtype: str) -> None:
    """Take those out whose gradients are far from the same network's with stored activations."""
    expected = {
        c.network: networks.gradients(c.net)
        for c in contenders
        if c.provider == "stored" and not c.note
    }
    for contender in contenders:
        if contender.note or contender.network not in expected:
            continue
        right = expected[contender.network]
        error = ((networks.gradients(contender.net) - right).norm() / right.norm()).item()
        # bfloat16 and the lattice round the function itself.
        bound = 0.3 if dtype == "bf16" else 0.03 if contender.provider == "exact" else 1e-3
        if not error < bound:
            contender.note = f"WRONG: gradients differ by {error:.2g}"


def bench(contenders: list[Contender], run, seconds: float) -> None:
    """Check, measure memory, time steps and evaluations in turns; findings go to the contenders."""
    for contender in contenders:
        contender.attempt(lambda c=contender: prepare(c, contenders, run))
    check(contenders, run.dtype)
    for contender in contenders:
        if not contender.has_graph and contender.provider not in networks.TUNED:
            contender.attempt(lambda c=contender: measure(c, run.device))
    time_in_turns(contenders, "step", run, 0.8 * seconds)
    for contender in contenders:
        contender.attempt(lambda c=contender: prepare_evaluation(c, contenders))
    time_in_turns(contenders, "eval", run, 0.2 * seconds)


def prepare_evaluation(contender: Contender, others: list[Contender]) -> None:
    contender.step.net.eval()
    contender.step.evaluate()
    if contender.has_graph:
        contender.capture("eval", others)


def time_in_turns(contenders: list[Contender], mode: str, run, seconds: float) -> None:
    running = {(c.network, c.provider): c for c in contenders if not c.note}
    calls = {key: c.call(mode) for key, c in running.items()}
    rounds = (timing.FEWEST, 40)
    times = timing.measure_interleaved(calls, run.clock, seconds=seconds, rounds=rounds)
    for key, contender in running.items():
        contender.times[mode] = times[key]


def measure(contender: Contender, device: str) -> None:
    """Memory and launches, of forward and backward alone: updates are as in any network.

    The step has run before, so gradients and the optimizer's state are not counted.
    """
    step = contender.step
    sizes = memory.held_and_peak(step.forward, device)
    held, peak = (f"{size / memory.MIB:.2f}" for size in sizes)
    count = launches(lambda: step.forward().backward(), device)
    contender.measured = {"held_mib": held, "peak_mib": peak, "operators": str(count)}


def rows_of(contender: Contender, run) -> list[Row]:
    """Of steps and evaluations; one with the note of what kept the contender out."""
    shape = contender.batch, 3, contender.side, contender.side
    dtype = record.dtype_name(run.dtype)
    base = record.row_of(contender.network, contender.provider, "step", dtype, shape, run.layout)
    base["note"] = contender.note
    if not contender.times:
        return [base]
    rows = []
    for mode, found in contender.times.items():
        first_s = contender.first_s if mode == "step" else None
        rows.append(base | {"mode": mode} | found.columns(first_s))
        rows[-1]["images_per_s"] = f"{contender.batch / found.loop_ms * 1e3:.2f}"
        if mode == "step":
            rows[-1] |= contender.measured
    return rows


def bench_group(name: str, run, providers, rivals, seconds: float) -> list[Contender]:
    """A network of ours in all modes in turns with the networks beside it."""
    batch = run.batch or (ON_GPU if run.device == "cuda" else ON_CPU).get(name, (4, ()))[0]
    contenders = contenders_of(name, run, providers, batch, run.official)
    stored = [key for key in ("stored", "stored" + networks.GRAPH) if key in providers]
    for rival in rivals:
        contenders += contenders_of(rival, run, stored, batch, None)
    bench(contenders, run, seconds)
    return contenders


def groups(run: argparse.Namespace) -> Iterator[list[Contender]]:
    """What ran; the compiler takes minutes, its tuning more, so what they make comes last."""
    table = ON_GPU if run.device == "cuda" else ON_CPU
    compiled, tuned = ("reversible", "stored", *networks.COMPILED), ()
    if run.device == "cuda":
        compiled += ("reversible+compile" + networks.GRAPH, "stored+compile" + networks.GRAPH)
        tuned = ("reversible", "stored", *networks.TUNED)
    later = [(name, kinds) for kinds in (compiled, tuned) if kinds for name in run.compile]
    share = run.seconds / max(len(run.models) + len(later), 1)
    for name in run.models:
        rivals = table.get(name, (4, ()))[1] if run.rivals is None else run.rivals
        yield bench_group(name, run, run.providers, rivals, share)
    run.official = None
    for name, providers in later:
        yield bench_group(name, run, providers, (), share)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = record.parser("bench_step", __doc__)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument("--models", nargs="*", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--rivals", nargs="*", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--providers", nargs="+", choices=networks.PROVIDERS)
    parser.add_argument("--compile", nargs="*", choices=NETWORKS, metavar="NAME",
                        help="networks to compile too; minutes each on a CPU")  # fmt: skip
    parser.add_argument("--batch", type=int)
    parser.add_argument("--side", type=int, help="default: 224 on a CPU, each network's own on GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 is autocast")
    record.add_layout(parser)
    parser.add_argument("--seconds", type=float, help="of timing, in all (default: 80, quick: 10)")
    run = record.parse(parser, arguments)
    is_gpu = run.device == "cuda"
    if not is_gpu and any(name.endswith(networks.GRAPH) for name in run.providers or ()):
        parser.error(f"--providers: {networks.GRAPH} needs --device cuda")
    if run.models is None:
        run.models = ["revbifpn_s0"] if run.quick else list(ON_GPU if is_gpu else ON_CPU)
    if run.rivals is None and run.quick:
        run.rivals = []
    run.providers = run.providers or default_providers(run)
    if run.compile is None:
        run.compile = ["revbifpn_s0"] if is_gpu and not run.quick else []
    run.side = run.side or (None if is_gpu else 224)
    run.dtype = run.dtype or ("bf16" if is_gpu else "fp32")
    run.seconds = run.seconds or (10 if run.quick else 80)
    run.clock = clocks.clock_for(run.device, captures=False)  # a graph is a provider of its own
    return run


def default_providers(run: argparse.Namespace) -> list[str]:
    graphs = ["reversible+graph", "stored+graph"] if run.device == "cuda" else []
    return [*(("reversible", "stored") if run.quick else networks.EAGER), *graphs]


def main(arguments: list[str]) -> int:
    run = parse(arguments)
    rows = record.recorder(run, "steps")
    for contenders in groups(run):
        rows.add(row for c in contenders for row in rows_of(c, run))
        del contenders
        _release()
    return rows.finish(tables.all_steps_table(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
