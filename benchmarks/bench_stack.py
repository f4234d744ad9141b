"""Training steps of reversible stacks beside stored activations and checkpoints: time, memory.

`python -m benchmarks.bench_stack` compares gradients first, times in turns, counts memory exactly
(CPU) or by the allocator (GPU), and adds its rows to the machine's CSV.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from revbifpn_kernels import ReversibleSequential

from .lib import harness, stacks
from .lib.harness import MIB, Row
from .lib.memory import held_and_peak
from .lib.operators import operators
from .lib.rivals import LATTICE, checkpoint_blocks

RESULTS = Path(__file__).parent / "results"
DEPTHS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Case:
    """A stack, and images of (batch, 3, side, side) whose quarter-size features enter it."""

    name: str
    make: Callable[[], ReversibleSequential]
    inputs: int  # streams
    batch: int
    side: int
    channels: tuple[int, ...] = stacks.CHANNELS
    is_autocast: bool = False
    is_timed: bool = True

    @property
    def dtype(self) -> str:
        return "fp32+bf16" if self.is_autocast else "fp32"


def providers_of(chain: ReversibleSequential) -> dict[str, nn.Module]:
    """The rivals, with the same weights."""
    names = ("reversible", "exact", "stored", "checkpoint")
    rivals = {name: copy.deepcopy(chain) for name in names}
    rivals["exact"].lattice = LATTICE
    rivals["stored"].reversible = rivals["checkpoint"].reversible = False
    checkpoint_blocks(rivals["checkpoint"])
    return rivals


def step_of(net: nn.Module, xs, cotangents, is_autocast: bool) -> Callable[[], Tensor]:
    """The forward of a step: its loss is linear in the outputs."""

    def forward() -> Tensor:
        with torch.autocast(xs[0].device.type, torch.bfloat16, enabled=is_autocast):
            ys = net(*xs)
        return sum((y * c).sum() for y, c in zip(ys, cotangents, strict=True))

    return forward


def print_operators() -> None:
    """Operator calls of a step of four silos, reversible beside stored."""
    chain, xs = stacks.silo_stack(4), stacks.streams(2, 64)
    counts = {}
    for name in ("reversible", "stored"):
        chain.reversible = name == "reversible"
        forward = step_of(chain, xs, [torch.ones_like(x) for x in xs], False)
        forward().backward()  # later steps add to gradients that are there
        counts[name] = operators(functools.partial(_step, forward))
    for name, count in sorted(counts["reversible"].items(), key=lambda item: -item[1]):
        print(f"{name:34}{count:7}{counts['stored'][name]:7}")
    print(f"{'all':34}{counts['reversible'].total():7}{counts['stored'].total():7}")


def gradients(net: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    net.zero_grad()
    forward().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()]).double()


def check(nets, forwards, case: Case) -> dict[str, str]:
    """Notes on providers whose gradients are far from those of stored activations."""
    expected = gradients(nets["stored"], forwards["stored"])
    notes = {}
    for name, net in nets.items():
        error = ((gradients(net, forwards[name]) - expected).norm() / expected.norm()).item()
        # The lattice and bfloat16 round the function itself.
        if not error < (0.3 if case.is_autocast else 0.03 if name == "exact" else 1e-4):
            notes[name] = f"WRONG: gradients differ by {error:.2g}"
    return notes


def bench(case: Case, run: argparse.Namespace, machine: Row) -> list[Row]:
    torch.manual_seed(0)
    chain = case.make().to(run.device)
    xs = stacks.streams(case.batch, case.side, case.channels)[: case.inputs]
    xs = [x.to(run.device).requires_grad_() for x in xs]
    with torch.no_grad():
        cotangents = [torch.randn_like(y) / y.numel() for y in chain(*xs)]
    nets = providers_of(chain)
    forwards = {name: step_of(net, xs, cotangents, case.is_autocast) for name, net in nets.items()}
    notes = check(nets, forwards, case)
    rows = {name: row_of(machine, case, name, notes.get(name, "")) for name in nets}
    if notes:
        return list(rows.values())
    for name, forward in forwards.items():
        held, peak = held_and_peak(forward, run.device)  # parameters have their gradients already
        rows[name] |= {"saved_mib": f"{held / MIB:.3f}", "peak_mib": f"{peak / MIB:.3f}"}
        rows[name]["note"] = f"{operators(functools.partial(_step, forward)).total()} operators"
    if case.is_timed:
        calls = {name: functools.partial(_step, forward) for name, forward in forwards.items()}
        times = harness.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=(3, 15))
        for name, timing in times.items():
            quantiles = {"ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80}
            rows[name] |= {column: f"{ms:.3f}" for column, ms in quantiles.items()}
    return list(rows.values())


def _step(forward: Callable[[], Tensor]) -> None:
    forward().backward()


def row_of(machine: Row, case: Case, provider: str, note: str) -> Row:
    return {
        **machine,
        "op": case.name,
        "provider": provider,
        "mode": "step",
        "dtype": case.dtype,
        "shape": f"{case.batch}x3x{case.side}x{case.side}",
        "layout": "nchw",
        "threads": str(torch.get_num_threads()),
        "note": note,
    }


def cases(device: str, is_quick: bool) -> list[Case]:
    silos = functools.partial(stacks.silo_stack, 2 if is_quick else 4)
    backbone = functools.partial(stacks.backbone, 2)
    batches = (2,) if is_quick else (4, 16) if device == "cpu" else (4, 64)
    timed = [Case(f"silos-{len(silos())}", silos, 4, batch, 224) for batch in batches]
    timed += [Case("backbone-s0", backbone, 1, batch, 224) for batch in batches[:2]]
    if device == "cuda":
        wide = stacks.S6_CHANNELS
        s6 = functools.partial(stacks.backbone, 5, wide)
        timed.append(Case("backbone-s6", s6, 1, 8, 352, channels=wide, is_autocast=True))
    depths = DEPTHS[:2] if is_quick else DEPTHS
    return timed + [
        Case(f"silos-{n}", functools.partial(stacks.silo_stack, n), 4, 2, 128, is_timed=False)
        for n in depths
    ]


def table(rows: list[Row]) -> None:
    """Each case beside its stored activations."""
    stored = {_case(row): row for row in rows if row["provider"] == "stored"}
    header = "stack batch dtype provider ms ratio held_MiB peak_MiB note".split()
    print("{:14}{:18}{:11}{:12}{:>9}{:>8}{:>11}{:>11}  {}".format(*header))
    for row in rows:
        rival = stored.get(_case(row), {})
        ratio = ""
        if row.get("ms_p50") and rival.get("ms_p50"):
            ratio = f"{float(row['ms_p50']) / float(rival['ms_p50']):.2f}"
        cells = [row[k] for k in ("op", "shape", "dtype", "provider")]
        cells += [row.get("ms_p50", ""), ratio, row.get("saved_mib", ""), row.get("peak_mib", "")]
        print("{:14}{:18}{:11}{:12}{:>9}{:>8}{:>11}{:>11}  {}".format(*cells, row["note"]))


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "shape", "dtype"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_stack", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--quick", action="store_true", help="two silos, few samples")
    parser.add_argument("--operators", action="store_true", help="list operator calls, and stop")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    run.clock = harness.clock_for(run.device)
    run.seconds = 2.0 if run.quick else 6.0
    return run


def main(arguments: list[str] | None = None) -> int:
    run = parse(arguments)
    if run.operators:
        print_operators()
        return 0
    machine = harness.describe_machine(run.device)
    path = harness.result_path(run.output, machine)
    rows: list[Row] = []
    for case in cases(run.device, run.quick):
        new = bench(case, run, machine)
        harness.record(path, new)
        rows += new
    table(rows)
    print(f"rows: {path}")
    return int(any(row["note"].startswith("WRONG") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
