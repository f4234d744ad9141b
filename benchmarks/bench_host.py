"""Times the host's part: of each operator's launches, of a training step, of small maps on a CPU.

It runs on a machine without a GPU, on one thread. Kernels are launched by Triton's C launcher on a
driver that does nothing. Convolutions in a training step are replaced by stubs that only allocate.
"""

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import revbifpn_kernels as ours
from revbifpn_kernels import create_model
from revbifpn_kernels.ops.norm_act.factors import norm_factors
from revbifpn_kernels.ops.norm_act.forward import norm_act
from revbifpn_kernels.ops.norm_act.gradient import norm_act_grad
from revbifpn_kernels.ops.norm_act.statistics import batch_norm_factors, batch_statistics
from revbifpn_kernels.ops.squeeze_excite.gates import squeeze_excite_gates
from revbifpn_kernels.ops.squeeze_excite.norm_act_excite_grad import norm_act_excite_grad
from revbifpn_kernels.ops.squeeze_excite.norm_act_gates import norm_act_gates

from .lib import host, record, tables, timing, workloads
from .lib.clocks import WARM_UPS, Call, CpuClock
from .lib.launches import calls_of_step
from .lib.networks import UNDROPPED
from .lib.operators import launches
from .lib.record import Row
from .lib.step import Step

# Network, images, side. Without convolutions and kernels the side hardly changes a step's time.
STEP = ("revbifpn_s0", 2, 64)
COUNTED = ("revbifpn_s0", 128, 224)
LEVELS = ((48, 56), (64, 28), (80, 14), (160, 7))  # channels and side of S0's streams at 224 px


@triton.jit
def _copy_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask), mask)


def op_calls() -> dict[str, Call]:
    """A call of each operator, on maps of S0's level 0 of one image."""
    inputs = workloads.Inputs.make(
        workloads.Case("S0", workloads.S0, "fp32", "nchw", 1), device="cpu"
    )
    x, grad, sources = inputs.x, inputs.grad, inputs.sources
    channels, hidden = x.shape[1], 12
    mean, invstd, weight, bias = (torch.rand(channels) for _ in range(4))
    norm, gate = (x, mean, invstd, weight, bias), torch.rand(1, channels)
    means = torch.rand(1, channels)
    squeeze = [torch.randn(hidden, channels, 1, 1), torch.randn(hidden),
               torch.randn(channels, hidden, 1, 1), torch.randn(channels)]  # fmt: skip
    running, batches = (mean.clone(), invstd.clone()), torch.zeros((), dtype=torch.int64)
    update = 1e-3, *running, batches, 0.1
    acts = "hardswish", "hardswish"
    return {
        "resample_add": lambda: ours.resample_add(x, sources),
        "resample_undo": lambda: ours.resample_undo(x, grad, sources),
        "resample_adjoint": lambda: ours.resample_adjoint(grad, inputs.sizes),
        "norm_act": lambda: norm_act(*norm, gate, acts[0]),
        "norm_act_means": lambda: torch.ops.revbifpn.norm_act_means(*norm, acts[0]),
        "norm_factors": lambda: norm_factors(*norm[1:], None, 1),
        "batch_statistics": lambda: batch_statistics(x, *update),
        "batch_norm_factors": lambda: batch_norm_factors(x, weight, bias, *update),
        "norm_act_gates": lambda: norm_act_gates(*norm, *squeeze, *acts),
        "norm_act_grad": lambda: norm_act_grad(grad, *norm, None, None, None, acts[0], True),
        "squeeze_excite_gates": lambda: squeeze_excite_gates(gate, *squeeze, acts[0]),
        "norm_act_excite_grad": lambda: norm_act_excite_grad(
            grad, *norm, gate, means, *squeeze, *acts, True
        ),
    }


def timed(calls: Mapping[object, Call], run: argparse.Namespace) -> dict[object, timing.Timing]:
    """Times the calls in turns, after warm-up calls that plan, compile and fill caches."""
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    return timing.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=run.rounds)


def bench_launches(run: argparse.Namespace) -> list[Row]:
    """Each operator; beside it, the same launches made by Triton's C launcher alone."""
    calls: dict[tuple[str, str], Call] = {}
    counts = {}
    x, y = torch.empty(1024), torch.empty(1024)
    with host.ops_launch_on_stub(), torch.no_grad():
        for name, call in op_calls().items():
            with host.recorded_launches() as repeats:
                # Its mode forces the dispatcher, so that the launcher gets tensors, as from Triton.
                launches(call, "cpu")
            counts[name] = len(repeats)
            calls[name, "ours"] = call
            calls[name, "launcher"] = functools.partial(_repeat, repeats)
        calls["a kernel of 3 arguments", "Triton"] = lambda: _copy_kernel[(8,)](
            x, y, 1024, BLOCK=128
        )
        times = timed(calls, run)
    return [
        record.row_of(name, provider, "launch", "fp32", workloads.S0)
        | found.columns()
        | {"launches": str(counts.get(name, 1))}
        for (name, provider), found in times.items()
    ]


def _repeat(repeats: list[Call]) -> None:
    for repeat in repeats:
        repeat()


def bench_steps(run: argparse.Namespace) -> list[Row]:
    """Forward and backward of S0 without convolutions, with MBConvs fused or module by module."""
    name, batch, side = STEP
    image, calls = torch.randn(batch, 3, side, side), {}
    for mode in ("reversible", "stored"):
        net = create_model(name, reversible=mode == "reversible", **UNDROPPED)
        step = Step(net, image)
        for provider in ("fused", "modules"):
            calls[mode, provider] = functools.partial(_forward_backward, step, provider == "fused")
    with host.ops_launch_on_stub():
        times = timed(calls, run)
        counts = {key: launches(call, "cpu") for key, call in calls.items()}
    shape = (batch, 3, side, side)
    return [
        record.row_of(f"{name}, {mode}", provider, "step", "fp32", shape)
        | times[mode, provider].columns()
        | {"operators": str(counts[mode, provider])}
        for mode, provider in calls
    ]


def _forward_backward(step: Step, is_fused: bool) -> None:
    with host.convolutions_stubbed(is_fused=is_fused):
        step.forward().backward()


def bench_counts(run: argparse.Namespace) -> list[Row]:
    """Counts the launches of our kernels in a bf16 training step on a GPU, on fake tensors."""
    name, batch, side = COUNTED
    rows = []
    for mode in ("reversible", "stored"):
        calls = calls_of_step(name, batch, side, torch.bfloat16, reversible=mode == "reversible")
        row = record.row_of(name, mode, "count", "fp32+bf16", (batch, 3, side, side))
        count = sum(len(call.launches()) for call in calls)
        rows.append(row | {"launches": str(count), "operators": str(len(calls))})
    return rows


def bench_small(run: argparse.Namespace) -> list[Row]:
    """`resample_add` on a CPU and eager PyTorch: all coarser streams of S0 added to each stream."""
    calls: dict[tuple, Callable] = {}
    for level, (channels, side) in enumerate(LEVELS[:-1]):
        x = torch.randn(1, channels, side, side)
        sources = [torch.randn(1, channels, s, s) for _, s in LEVELS[level + 1 :]]
        calls[x.shape, "ours"] = functools.partial(ours.resample_add, x, sources)
        calls[x.shape, "torch"] = functools.partial(_eager, x, sources)
    with torch.no_grad():
        times = timed(calls, run)
    return [
        record.row_of("resample_add", provider, "cpu", "fp32", shape) | found.columns()
        for (shape, provider), found in times.items()
    ]


def _eager(x: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
    for source in sources:
        x = x + F.interpolate(source, size=x.shape[2:], mode="bilinear")
    return x


PARTS = {
    "launches": bench_launches,
    "steps": bench_steps,
    "counts": bench_counts,
    "small": bench_small,
}


def main(arguments: list[str]) -> int:
    parser = record.parser("bench_host", __doc__, on_gpu=False)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="what to measure (default: all)",
    )
    run = record.parse(parser, arguments)
    if torch.cuda.is_available():
        parser.error("the stub driver needs a machine without a GPU")
    warnings.filterwarnings("ignore", message="Warning only once")
    torch.set_num_threads(1)
    run.clock = CpuClock()
    run.seconds, run.rounds = (2.0, (3, 10)) if run.quick else (20.0, (7, 40))
    rows = record.recorder(run, "host", "cpu")
    for part in run.parts:
        rows.add(PARTS[part](run))
    return rows.finish(tables.host_page(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
