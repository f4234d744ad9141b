"""A training step and evaluation of whole models: ours beside stored activations and the authors'.

`python -m benchmarks.bench_models --official DIR`, DIR a checkout of the authors' repository, which
is imported from there and is no part of ours. Their weights are loaded into our models, outputs and
gradients compared first; times are taken in turns, memory is counted exactly.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revbifpn_kernels import create_model, load_official, to_official

from . import harness
from .harness import MIB, Row
from .memory import held_and_peak

RESULTS = Path(__file__).parent / "results"


def official_models(folder: Path, name: str) -> dict[str, nn.Module]:
    """The authors' network in their two modes."""
    sys.path.insert(0, str(folder))
    import revbifpn

    with contextlib.redirect_stdout(io.StringIO()):  # it announces its image size
        make = revbifpn.model_fns[name]
        return {
            "official reversible": make(head_dropout=0.0, stochastic_depth=0.0),
            "official stored": make(
                head_dropout=0.0, stochastic_depth=0.0, disable_rev=True, disable_recomp=True
            ),
        }


def models_of(name: str, official: Path | None) -> dict[str, nn.Module]:
    """All with the same weights."""
    options = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    nets: dict[str, nn.Module] = {
        "reversible": create_model(name, **options),
        "stored": create_model(name, reversible=False, **options),
    }
    weights = {key: t.detach().clone() for key, t in to_official(nets["reversible"]).items()}
    load_official(nets["stored"], weights)
    if official is not None:
        rivals = official_models(official, name)
        for net in rivals.values():
            net.load_state_dict(weights)
        nets |= rivals
    return nets


def loss_of(net: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(image), labels)


def step(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def evaluation(net: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return net(image)

    return call


def gradient(net: nn.Module) -> Tensor:
    """All of it, in the order of the authors' names."""
    named = to_official(net) if hasattr(net, "body") else dict(net.named_parameters())
    parts = (named[key] for key in sorted(named))
    return torch.cat([p.grad.flatten() for p in parts if p.grad is not None])


def check(nets: dict[str, nn.Module], losses: dict[str, Callable[[], Tensor]]) -> dict[str, str]:
    """Notes on those whose gradients are far from ours with stored activations."""
    for loss in losses.values():
        step(loss)
    expected = gradient(nets["stored"])
    notes = {}
    for name, net in nets.items():
        error = ((gradient(net) - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            notes[name] = f"WRONG: gradients differ by {error:.2g}"
    return notes


def bench(name: str, run: argparse.Namespace, machine: Row) -> list[Row]:
    torch.manual_seed(0)
    nets = {key: net.to(run.device) for key, net in models_of(name, run.official).items()}
    image = torch.randn(run.batch, 3, run.side, run.side, device=run.device)
    labels = torch.arange(run.batch, device=run.device)
    losses = {key: loss_of(net, image, labels) for key, net in nets.items()}
    notes = check(nets, losses)
    rows = {(key, mode): _row(machine, name, key, mode, run) for key in nets for mode in MODES}
    for key, note in notes.items():
        rows[key, "step"]["note"] = rows[key, "eval"]["note"] = note
    sound = {key: net for key, net in nets.items() if key not in notes}
    for key in sound:
        held, peak = held_and_peak(losses[key], run.device)  # gradients are there already
        rows[key, "step"] |= {"saved_mib": f"{held / MIB:.2f}", "peak_mib": f"{peak / MIB:.2f}"}
    steps = {key: lambda loss=losses[key]: step(loss) for key in sound}
    _time(rows, "step", steps, run)
    forwards = {key: evaluation(net.eval(), image) for key, net in sound.items()}
    _time(rows, "eval", forwards, run)
    return list(rows.values())


MODES = ("step", "eval")


def _time(rows, mode: str, calls: dict[str, Callable[[], object]], run) -> None:
    for call in calls.values():
        call()
    times = harness.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=(5, 25))
    for key, timing in times.items():
        quantiles = {"ms_p20": timing.p20, "ms_p50": timing.p50, "ms_p80": timing.p80}
        rows[key, mode] |= {column: f"{ms:.3f}" for column, ms in quantiles.items()}


def _row(machine: Row, name: str, provider: str, mode: str, run) -> Row:
    return {
        **machine,
        "op": name,
        "provider": provider,
        "mode": mode,
        "dtype": "fp32",
        "shape": f"{run.batch}x3x{run.side}x{run.side}",
        "layout": "nchw",
        "threads": str(torch.get_num_threads()),
        "note": "",
    }


def table(rows: list[Row]) -> None:
    print(
        "{:13}{:6}{:21}{:>9}{:>10}{:>10}  {}".format(
            *"model mode provider ms held peak note".split()
        )
    )
    for row in rows:
        cells = [row[k] for k in ("op", "mode", "provider")]
        cells += [row.get(k, "") for k in ("ms_p50", "saved_mib", "peak_mib")]
        print("{:13}{:6}{:21}{:>9}{:>10}{:>10}  {}".format(*cells, row["note"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_models", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument("--models", nargs="+", default=["revbifpn_s0", "revbifpn_s2"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each mode's timing")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    if run.threads:
        torch.set_num_threads(run.threads)
    run.clock = harness.clock_for(run.device)
    machine = harness.describe_machine(run.device)
    rows: list[Row] = []
    for name in run.models:
        new = bench(name, run, machine)
        harness.record(harness.result_path(run.output, machine), new)
        rows += new
    table(rows)
    return int(any(row["note"].startswith("WRONG") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
