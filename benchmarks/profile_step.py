"""Where the time of a training step goes: by kind of operator, by level, and outside of operators.

`python -m benchmarks.profile_step` times every operator of a forward and backward by itself, and
the same step unwatched, in turns: what is left of that is Python and autograd's engine. On a CPU in
processor time of one thread. On a GPU operators run one at a time behind a spin: what is left (or
missing) is the host.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .bench_step import DTYPES
from .lib import harness, rivals
from .lib.harness import Row
from .lib.operators import OperatorTimes, launches
from .lib.training import Step

RESULTS = Path(__file__).parent / "results"
DEFAULT = ("revbifpn_s0", "revbifpn_s2", "efficientnet_b0")
PROVIDERS = ("reversible", "stored")
OUTSIDE = "Python and engine"


class Profile:
    """Times of one provider's step, watched and unwatched in turns."""

    def __init__(self, step: Step, run: argparse.Namespace, clock) -> None:
        self.call = backward_of(step)
        self.run, self.clock = run, clock
        self.watched: list[OperatorTimes] = []
        self.whole_ms: list[float] = []

    def sample(self) -> None:
        self.whole_ms.append(self._unwatched_ms())
        with OperatorTimes(self.run.batch, self.run.side, self.run.device) as times:
            self.call()
        self.watched.append(times)

    def _unwatched_ms(self) -> float:
        if self.run.device == "cuda":
            return self.clock.sample_ms(self.call, harness.SLOW_MS)
        start = time.thread_time()
        self.call()
        return (time.thread_time() - start) * 1e3

    def rows(self) -> list[Row]:
        """All of the step, each kind of operator and the rest, each level."""
        whole = statistics.median(self.whole_ms)
        kinds, levels = self._sums("kinds"), self._sums("levels")
        rest = whole - sum(ms for ms, _ in kinds.values())
        kinds[OUTSIDE] = rest, 0
        parts = {"all": (whole, launches(self.call, self.run.device))}
        parts |= {f"kind: {name}": part for name, part in kinds.items()}
        parts |= {f"level: {name}": part for name, part in levels.items()}
        return [
            {"mode": f"profile, {name}", "ms_p50": f"{ms:.3f}", "operators": str(calls)}
            for name, (ms, calls) in parts.items()
        ]

    def _sums(self, group: str) -> dict[str, tuple[float, int]]:
        """Milliseconds and calls, by name."""
        samples = [getattr(times, group) for times in self.watched]
        return {
            name: (statistics.median(sum(s[name]) for s in samples), len(samples[0][name]))
            for name in sorted(samples[0])
        }


def backward_of(step: Step) -> Callable[[], None]:
    """Forward and backward into gradients that are there; no update."""
    step()

    def call() -> None:
        step.forward().backward()

    call()
    return call


def bench(name: str, run: argparse.Namespace, machine: Row) -> list[Row]:
    clock = harness.clock_for(run.device)
    profiles = {}
    for provider, net in rivals.providers_of(name, PROVIDERS, run.official).items():
        torch.manual_seed(0)
        image = torch.randn(run.batch, 3, run.side, run.side, device=run.device)
        step = Step(net.to(run.device), image, DTYPES[run.dtype])
        profiles[provider] = Profile(step, run, clock)
    for _ in range(run.repeats):
        for profile in profiles.values():
            profile.sample()
    return [
        row_of(name, provider, run, machine) | row
        for provider, profile in profiles.items()
        for row in profile.rows()
    ]


def row_of(name: str, provider: str, run: argparse.Namespace, machine: Row) -> Row:
    return {
        **machine,
        "op": name,
        "provider": provider,
        "dtype": "fp32" if run.dtype == "fp32" else "fp32+bf16",
        "shape": f"{run.batch}x3x{run.side}x{run.side}",
        "layout": "nchw",
        "threads": str(torch.get_num_threads()),
    }


def table(rows: list[Row]) -> None:
    for row in rows:
        share = float(row["ms_p50"]) / _whole(row, rows)
        cells = [row[k] for k in ("op", "provider", "mode", "ms_p50")]
        print(
            "{:16}{:20}{:50}{:>10} ms {:>5.1%} {:>7} calls".format(*cells, share, row["operators"])
        )


def _whole(row: Row, rows: list[Row]) -> float:
    key = row["op"], row["provider"]
    wholes = {(r["op"], r["provider"]): r["ms_p50"] for r in rows if r["mode"] == "profile, all"}
    return float(wholes[key])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument("--models", nargs="+", choices=rivals.NETWORKS, default=DEFAULT)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if found == "cuda" else "fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    torch.set_num_threads(1)  # whose processor time is all that is spent
    machine = harness.describe_machine(run.device)
    path = harness.result_path(run.output, machine)
    for name in run.models:
        rows = bench(name, run, machine)
        harness.record(path, rows)
        table(rows)
    print(f"rows: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
