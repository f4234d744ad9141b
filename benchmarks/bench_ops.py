"""Times the ops against PyTorch eager, torch.compile and a plain copy.

Every op is first compared with PyTorch in float64; a wrong one prints WRONG, gets no time, and
makes the exit status 1. Times are interleaved medians. GB/s count only the bytes that must move.
"""

import argparse
import gc
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .lib import harness, report
from .lib.harness import Row, Timing
from .lib.workloads import (
    OPS,
    Case,
    Inputs,
    Op,
    Shape,
    cases_for_shapes,
    cpu_cases,
    cuda_cases,
    empty_op,
    quick_cases,
)

RESULTS = Path(__file__).parent / "results"
HOST_SHAPES = {"cpu": (1, 8, 8, 8), "cuda": (1, 48, 56, 56)}


def gate(op: Op, inputs: Inputs) -> str:
    """What is wrong with ours, or "": it may err twice what PyTorch errs, plus one rounding."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `empty` returns with NaN
    try:
        produced = op.ours(inputs.with_x(inputs.x.clone()) if op.in_place else inputs)
    except Exception as error:
        if harness.is_out_of_memory(error):
            raise
        return f"raised {type(error).__name__}: {error}"
    finally:
        torch.use_deterministic_algorithms(False)
    for name, result in zip(op.outputs, produced, strict=True):
        if not math.isfinite(result.sum(dtype=torch.float32)):
            return f"{name} holds values that are not finite"
    return _excess_error(op, inputs, produced)


def ends(tensor: Tensor) -> Tensor:
    """The first and the last image of a batch."""
    return tensor[:: max(len(tensor) - 1, 1)]


def _excess_error(op: Op, inputs: Inputs, produced: tuple[Tensor, ...]) -> str:
    """Compare the first and the last image; each plane is computed alone."""
    few = inputs.map(ends)
    exact = op.eager(few.map(lambda tensor: tensor.to(torch.float64, copy=True)))
    working = op.eager(few.map(lambda tensor: tensor.to(inputs.x.dtype, copy=True)))
    for name, result, usual, truth in zip(op.outputs, produced, working, exact, strict=True):
        rounded = usual.to(result.dtype).double()
        rounding = torch.finfo(result.dtype).eps * truth.abs().max()
        allowed = (2 * (rounded - truth).abs().max() + rounding).item()
        error = (ends(result).double() - truth).abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
    return ""


def providers(op: Op, case: Case, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Whoever is timed in turns, by name; the copies are what memory allows."""
    x, buffer = inputs.x, torch.empty_like(inputs.x)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: buffer.copy_(x)}
    if op.allocates_stream:
        calls["clone"] = x.clone
    if op.in_place:
        inputs = inputs.with_x(buffer)  # every turn's copy undoes what was added to it
    calls["ours"] = lambda: op.ours(inputs)
    if "torch" in case.rivals and op.mode != "inverse":
        if "bwd" in op.mode:
            inputs.graph  # noqa: B018  (built here, so that neither time nor memory counts it)
        calls["torch"] = lambda: op.eager(inputs)
    if "compile" in case.rivals and op.compiled is not None:
        torch._dynamo.reset()
        compiled = torch.compile(op.compiled, fullgraph=True, dynamic=False)
        calls["compile"] = lambda: compiled(inputs.x, inputs.grad, inputs.sources)
    return calls


def _first_calls(
    calls: dict[str, Callable[[], object]], device: str
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Run each call once, so that compiling is over; peak memory, and notes of what failed."""
    peaks: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for name in list(calls):
        try:
            if name == "compile":
                calls[name]()
            peaks[name] = harness.peak_mib(calls[name], device)
        except Exception as error:
            known = harness.is_out_of_memory(error)
            if not known and name != "compile":
                raise
            notes[name] = "out of memory" if known else f"failed: {type(error).__name__}"
            del calls[name]
            gc.collect()
    return peaks, notes


def _saved(op: Op, inputs: Inputs, name: str) -> float | None:
    """What autograd would keep of the whole batch, found on two images of it."""
    call = {"ours": op.ours, "torch": op.eager}.get(name)
    if op.mode != "fwd" or call is None:
        return None
    few = inputs.map(lambda tensor: ends(tensor).clone())
    leaves = [source.requires_grad_() for source in few.sources]
    with torch.enable_grad():
        kept = harness.saved_mib(lambda: call(Inputs(few.x, few.grad, leaves)))
    return kept * len(inputs.x) / len(few.x)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _row(machine: Row, case: Case, op: str, provider: str, mode: str, note: str = "") -> Row:
    return machine | {
        "op": op,
        "provider": provider,
        "mode": mode,
        "dtype": case.dtype,
        "shape": case.shape_text,
        "layout": case.layout,
        "threads": str(case.threads),
        "note": note or case.name,
    }


def _timed_row(row: Row, timing: Timing, moved: int, yardsticks: dict[str, float]) -> Row:
    """Fill in the times, GB/s, and the shares of what the copies of the same turns reached."""
    gbps = moved / timing.p50 / 1e6
    shares = {f"share_of_{name}": _number(gbps / of) for name, of in yardsticks.items()}
    times = {f"ms_p{q}": _number(getattr(timing, f"p{q}")) for q in (20, 50, 80)}
    return row | times | shares | {"gbps": _number(gbps)}


def bench_op(
    op: Op, case: Case, inputs: Inputs, machine: Row, run: argparse.Namespace
) -> list[Row]:
    """Gate, then time one op on one case."""
    fault = gate(op, inputs)
    if fault:
        tqdm.write(f"WRONG {op.name} ({op.mode}) {case}: {fault}")
        return [_row(machine, case, op.name, "ours", op.mode, f"WRONG: {fault}")]
    calls = providers(op, case, inputs)
    saved = {name: _saved(op, inputs, name) for name in calls}
    peaks, notes = _first_calls(calls, run.device)
    timings = harness.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=run.rounds)
    copied = 2 * inputs.x.nbytes
    moved = {
        name: copied if name in ("copy", "clone") else op.bytes_moved(inputs) for name in timings
    }
    yardsticks = {
        name: copied / timings[name].p50 / 1e6 for name in ("copy", "clone") if name in timings
    }
    rows = [_row(machine, case, op.name, name, op.mode, note) for name, note in notes.items()]
    for name, timing in timings.items():
        row = _timed_row(
            _row(machine, case, op.name, name, op.mode), timing, moved[name], yardsticks
        )
        rows.append(row | {"peak_mib": _number(peaks[name]), "saved_mib": _number(saved[name])})
    return rows


def bench_host(machine: Row, run: argparse.Namespace) -> list[Row]:
    """Python's and the dispatcher's cost of a call, beside an empty custom op's."""
    case = Case("host time of a call", HOST_SHAPES[run.device], "fp32", "nchw", run.threads)
    inputs = Inputs.make(case, run.device)
    empty = empty_op()
    arguments = inputs.x, inputs.sources, [], [], 1.0, "bilinear", None
    calls = {("empty_op", "empty"): lambda: empty(*arguments)}
    for op in OPS:
        if op.mode != "inverse":  # the forward's host path
            calls[op.name, "ours"] = lambda op=op: op.ours(inputs)
            calls[op.name, "torch"] = lambda op=op: op.eager(inputs)
    rows = []
    for (name, provider), call in calls.items():
        call()
        cost = harness.host_ms(call, run.device)
        row = _row(machine, case, name, provider, "host")
        rows.append(row | {f"ms_p{q}": _number(cost) for q in (20, 50, 80)})
    return rows


def run_cases(cases: list[Case], machine: Row, run: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of each op on each case as they are known."""
    with tqdm(total=len(cases) * len(OPS), unit="op", dynamic_ncols=True, disable=None) as progress:
        for case in cases:
            torch.set_num_threads(case.threads)
            inputs = None
            for op in OPS:
                progress.set_description(f"{op.name} {op.mode} {case}")
                try:
                    inputs = inputs or Inputs.make(case, run.device)
                    yield bench_op(op, case, inputs, machine, run)
                except Exception as error:
                    if not harness.is_out_of_memory(error):
                        raise
                    yield [_row(machine, case, op.name, "ours", op.mode, "out of memory")]
                progress.update()
            del inputs
            gc.collect()
            if run.device == "cuda":
                torch.cuda.empty_cache()


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 4 or not all(side.isdigit() and int(side) > 0 for side in sides):
            raise argparse.ArgumentTypeError(
                f"{part.strip()!r} is no NxCxHxW of positive whole numbers, such as 16x64x256x256"
            )
        shapes.append(tuple(int(side) for side in sides))
    return shapes


def _old_csv(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file; give the CSV of an earlier run")
    missing = set(harness.KEY) - set(next(iter(harness.read_rows(path)), {}))
    if missing:
        raise argparse.ArgumentTypeError(f"{text!r} lacks the columns {', '.join(sorted(missing))}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ops", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, few samples, no compiler"
    )
    parser.add_argument("--shapes", type=_shapes, metavar="NxCxHxW,...", help="instead of ours")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR|CSV",
        help="where the rows go (default: benchmarks/results)",
    )
    parser.add_argument(
        "--compare",
        type=_old_csv,
        metavar="OLD.csv",
        help="say what became slower since, relative to each run's own copy",
    )
    run = parser.parse_args(arguments)
    if run.device == "cuda" and found == "cpu":
        parser.error("--device cuda: torch finds no CUDA GPU here")
    if run.output.suffix != ".csv" and run.output.is_file():
        parser.error(f"--output: {run.output} is a file, but neither a folder nor a .csv")
    run.threads = torch.get_num_threads()
    run.clock = harness.clock_for(run.device)
    run.seconds, run.rounds = (0.3, (2, 5)) if run.quick else (0.7, (2, 15))
    if run.device == "cuda":
        run.seconds, run.rounds = (0.1, (3, 20)) if run.quick else (0.3, (5, 100))
    return run


def choose_cases(run: argparse.Namespace) -> list[Case]:
    if run.shapes:
        return cases_for_shapes(run.shapes, run.threads)
    if run.quick:
        return quick_cases(run.threads)
    return (cuda_cases if run.device == "cuda" else cpu_cases)(run.threads)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    run = parse(arguments)
    machine = harness.describe_machine(run.device)
    path = harness.result_path(run.output, machine)
    old = harness.read_rows(run.compare) if run.compare else []
    rows: list[Row] = []
    for new in run_cases(choose_cases(run), machine, run):
        harness.record(path, new)
        rows += new
    torch.set_num_threads(run.threads)
    wrong = [row for row in rows if row["note"].startswith("WRONG")]
    if not wrong:
        host = bench_host(machine, run)
        harness.record(path, host)
        rows += host
    report.print_table(rows)
    if run.compare:
        report.print_comparison(old, rows)
    print(f"rows: {path}")
    if wrong:
        print(f"{len(wrong)} WRONG", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
