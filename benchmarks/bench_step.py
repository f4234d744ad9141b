"""Training steps of whole networks, ours in every mode beside what a user would pick instead.

Compares gradients first, takes times in turns, counts memory exactly (CPU) or by the allocator
(GPU). `--official DIR`, a checkout of the authors' repository, which is imported from there and is
no part of ours, adds their network with the same weights.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .lib import memory, networks, record, tables, timing
from .lib.networks import NETWORKS
from .lib.operators import launches
from .lib.record import DTYPES, Row
from .lib.step import Step
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
    measured: Row = field(default_factory=dict)  # memory and launches, columns of its row
    times: dict[str, Timing] = field(default_factory=dict)

    def attempt(self, call: Callable[[], object]) -> None:
        """Note where memory ran out, or the compiler gave up."""
        if self.note:
            return
        try:
            call()
        except Exception as error:
            is_full = memory.is_out_of_memory(error)
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
    nets = networks.providers_of(name, providers, official)
    return [Contender(name, key, side, batch, net) for key, net in nets.items()]


def prepare(contender: Contender, run: argparse.Namespace) -> None:
    torch.manual_seed(0)
    image = torch.randn(contender.batch, 3, contender.side, contender.side).to(run.device)
    contender.step = Step(contender.net.to(run.device), image, DTYPES[run.dtype])
    contender.step()


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
        contender.attempt(lambda c=contender: prepare(c, run))
    check(contenders, run.dtype)
    for contender in contenders:
        contender.attempt(lambda c=contender: measure(c, run.device))
    running = {(c.network, c.provider): c for c in contenders if not c.note}
    steps = {key: c.step for key, c in running.items()}
    time_in_turns = functools.partial(timing.measure_interleaved, clock=run.clock)
    times = time_in_turns(steps, seconds=0.8 * seconds, rounds=(5, 40))
    for key, contender in running.items():
        contender.times = {"step": times[key]}
        contender.step.net.eval()
    evaluations = {key: step.evaluate for key, step in steps.items()}
    for call in evaluations.values():
        call()
    times = time_in_turns(evaluations, seconds=0.2 * seconds, rounds=(3, 40))
    for key, contender in running.items():
        contender.times["eval"] = times[key]


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
    base = record.row_of(contender.network, contender.provider, "step", dtype, shape)
    base["note"] = contender.note
    if contender.note:
        return [base]
    rows = []
    for mode, found in contender.times.items():
        rows.append(base | {"mode": mode} | found.columns())
        rows[-1]["images_per_s"] = f"{contender.batch / found.p50 * 1e3:.2f}"
        if mode == "step":
            rows[-1] |= contender.measured
    return rows


def bench_group(name: str, run, providers, rivals, seconds: float) -> list[Contender]:
    """A network of ours in all modes in turns with the networks beside it."""
    batch = run.batch or (ON_GPU if run.device == "cuda" else ON_CPU).get(name, (4, ()))[0]
    contenders = contenders_of(name, run, providers, batch, run.official)
    for rival in rivals:
        contenders += contenders_of(rival, run, ("stored",), batch, None)
    bench(contenders, run, seconds)
    return contenders


def groups(run: argparse.Namespace) -> Iterator[list[Contender]]:
    """What ran; the compiler takes minutes, so what it makes comes last."""
    table = ON_GPU if run.device == "cuda" else ON_CPU
    share = run.seconds / max(len(run.models) + len(run.compile), 1)
    for name in run.models:
        rivals = table.get(name, (4, ()))[1] if run.rivals is None else run.rivals
        yield bench_group(name, run, run.providers, rivals, share)
    run.official = None
    for name in run.compile:
        providers = ("reversible", "stored", *networks.COMPILED)
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
    parser.add_argument("--seconds", type=float, help="of timing, in all (default: 80, quick: 10)")
    run = record.parse(parser, arguments)
    is_gpu = run.device == "cuda"
    if run.models is None:
        run.models = ["revbifpn_s0"] if run.quick else list(ON_GPU if is_gpu else ON_CPU)
    if run.rivals is None and run.quick:
        run.rivals = []
    run.providers = run.providers or (("reversible", "stored") if run.quick else networks.EAGER)
    if run.compile is None:
        run.compile = ["revbifpn_s0"] if is_gpu and not run.quick else []
    run.side = run.side or (None if is_gpu else 224)
    run.dtype = run.dtype or ("bf16" if is_gpu else "fp32")
    run.seconds = run.seconds or (10 if run.quick else 80)
    run.clock = timing.clock_for(run.device)
    return run


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
