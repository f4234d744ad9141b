"""Times the resample ops beside a plain copy, PyTorch eager and torch.compile.

Every op is first compared with PyTorch in float64; a wrong one gets no time, and makes the exit
status 1. Times are interleaved medians, on a GPU of the device alone (lib/clocks.py). GB/s count
only the bytes that must move.
"""

import argparse
import functools
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .lib import clocks, memory, record, tables, timing, workloads
from .lib.first_calls import COMPILERS, FirstCalls, compilers_of
from .lib.record import Row
from .lib.workloads import OPS, Case, Inputs, Op, Shape, empty_op

HOST_SHAPES = {"cpu": (1, 8, 8, 8), "cuda": (1, 48, 56, 56)}
Calls = dict[str, Callable[[], Sequence[Tensor]]]


def nan_filled(call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The results of a call for which `empty` returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def ends(tensor: Tensor) -> Tensor:
    """The first and the last image of a batch."""
    return tensor[:: max(len(tensor) - 1, 1)]


def compared(op: Op, inputs: Inputs, produced, slack: float) -> tuple[str, float]:
    """What is wrong, or "", and the largest error against float64.

    Allowed is `slack` times this: twice PyTorch's error, plus one rounding. The first and the last
    image are compared, as each plane is computed alone.
    """
    for name, result in zip(op.outputs, produced, strict=True):
        if not math.isfinite(result.sum(dtype=torch.float32)):
            return f"{name} holds values that are not finite", math.nan
    largest = 0.0
    few = inputs.map(ends)
    exact = op.eager(few.map(lambda tensor: tensor.to(torch.float64, copy=True)))
    working = op.eager(few.map(lambda tensor: tensor.to(inputs.x.dtype, copy=True)))
    for name, result, usual, truth in zip(op.outputs, produced, working, exact, strict=True):
        rounded = usual.to(result.dtype).double()
        rounding = torch.finfo(result.dtype).eps * truth.abs().max()
        allowed = slack * (2 * (rounded - truth).abs().max() + rounding).item()
        error = (ends(result).double() - truth).abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.2e}, allowed {allowed:.2e}", error
        largest = max(largest, error)
    return "", largest


def providers(op: Op, case: Case, inputs: Inputs) -> Calls:
    """Whoever is timed in turns, by name; the copies are what memory allows."""
    x, buffer = inputs.x, torch.empty_like(inputs.x)
    calls: Calls = {"copy": lambda: buffer.copy_(x)}
    if op.allocates_stream:
        calls["clone"] = x.clone
    if op.in_place:
        inputs = inputs.with_x(buffer)  # every turn's copy undoes what was added to it
    calls["ours"] = lambda: op.ours(inputs)
    if op.mode != "inverse":
        calls["torch"] = lambda: op.eager(inputs)
    if case.compiles and op.compiled is not None:
        torch._dynamo.reset()
        for name, mode in compilers_of(x.device.type).items():
            compiled = torch.compile(op.compiled, fullgraph=True, dynamic=False, mode=mode)
            calls[name] = functools.partial(compiled, inputs.x, inputs.grad, inputs.sources)
    return calls


def race(op: Op, case: Case, inputs: Inputs, first: FirstCalls) -> Calls:
    """Calls of the providers that are right; none if ours is wrong."""
    compare = functools.partial(compared, op, inputs)
    given = inputs.with_x(inputs.x.clone()) if op.in_place else inputs
    first.run("ours", lambda: nan_filled(lambda: op.ours(given)), compare)
    if first.notes:
        return {}
    calls = providers(op, case, inputs)
    for name in filter(calls.__contains__, COMPILERS):
        calls["copy"]()  # what an op in place adds to
        first.run(name, calls[name], compare)
    return {name: call for name, call in calls.items() if name not in first.notes}


def peaks_of(calls: Calls, first: FirstCalls, device: str) -> dict[str, float]:
    """The peak memory in MiB of each call; takes out whose memory is not enough."""
    peaks = {}
    for name in list(calls):
        try:
            peaks[name] = memory.peak_mib(calls[name], device)
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            first.notes[name] = "out of memory"
            del calls[name]
            gc.collect()
    return peaks


def _row(case: Case, op: str, provider: str, mode: str, note: str = "") -> Row:
    row = record.row_of(op, provider, mode, case.dtype, case.shape, case.layout)
    return row | {"note": note or case.name}


def bench_op(op: Op, case: Case, inputs: Inputs, run: argparse.Namespace) -> list[Row]:
    """Gate, then time one op on one case."""
    first = FirstCalls(run.clock, run.device)
    calls = race(op, case, inputs, first)
    peaks = peaks_of(calls, first, run.device)
    times = timing.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=run.rounds)
    copied = 2 * inputs.x.nbytes
    rates = {
        name: (copied if name in ("copy", "clone") else op.bytes_moved(inputs)) / found.p50 / 1e6
        for name, found in times.items()
    }
    rows = [_row(case, op.name, name, op.mode, note) for name, note in first.notes.items()]
    for name, found in times.items():
        speed = {"gbps": f"{rates[name]:.6g}"}
        speed |= {f"share_of_{k}": f"{rates[name] / rates[k]:.4g}" for k in ("copy", "clone")
                  if k in rates}  # fmt: skip
        if run.clock.peak_gbps:
            speed["share_of_peak"] = f"{rates[name] / run.clock.peak_gbps:.4g}"
        speed["peak_mib"] = f"{peaks[name]:.6g}"
        columns = found.columns(first.seconds.get(name)) | first.columns(name)
        rows.append(_row(case, op.name, name, op.mode) | columns | speed)
    return rows


def bench_host(run: argparse.Namespace) -> list[Row]:
    """Python's and the dispatcher's cost of a call, beside an empty custom op's."""
    case = Case("host time per call", HOST_SHAPES[run.device], "fp32", "nchw", run.threads)
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
        cost = run.clock.host_ms(call, repeats=300, samples_wanted=5)
        rows.append(_row(case, name, provider, "host") | {"ms_p50": f"{cost:.6g}"})
    return rows


def run_cases(cases: list[Case], run: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of each op on each case as they are known."""
    with tqdm(total=len(cases) * len(OPS), unit="op", dynamic_ncols=True, disable=None) as progress:
        for case in cases:
            torch.set_num_threads(case.threads)
            inputs = None
            for op in OPS:
                progress.set_description(f"{op.name} {op.mode} {case}")
                try:
                    inputs = inputs or Inputs.make(case, run.device)
                    yield bench_op(op, case, inputs, run)
                except Exception as error:
                    if not memory.is_out_of_memory(error):
                        raise
                    yield [_row(case, op.name, "ours", op.mode, "out of memory")]
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


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = record.parser("bench_ops", __doc__)
    parser.add_argument("--shapes", type=_shapes, metavar="NxCxHxW,...", help="instead of ours")
    run = record.parse(parser, arguments)
    run.threads = torch.get_num_threads()
    run.clock = clocks.clock_for(run.device)
    run.seconds, run.rounds = (0.4, (2, 5)) if run.quick else (0.6, (3, 15))
    if run.device == "cuda":
        run.seconds, run.rounds = (0.1, (3, 20)) if run.quick else (0.3, (timing.FEWEST, 100))
    return run


@torch.no_grad()
def main(arguments: list[str]) -> int:
    run = parse(arguments)
    rows = record.recorder(run, "ops")
    for new in run_cases(workloads.cases_of(run), run):
        rows.add(new)
    torch.set_num_threads(run.threads)
    rows.add(bench_host(run))
    return rows.finish(tables.ops_table(rows.rows) + "\n" + tables.host_table(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
