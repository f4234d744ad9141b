"""What the compiler made of every Triton kernel, for GPUs that need not be there.

Registers, spills, shared memory, widest accesses and machine instructions per element of x, beside
the budget: what a GPU can issue while it moves the op's compulsory bytes at its copy speed. For
sm_90 also what the memory accesses cost, counted by executing the PTX of some blocks.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from revbifpn_kernels.ops.launch import Launch
from revbifpn_kernels.ops.norm_act import forward, gradient, sums
from revbifpn_kernels.ops.norm_act.statistics import plan_batch_statistics
from revbifpn_kernels.ops.norm_act.tiles import norm_operands
from revbifpn_kernels.ops.resample.add import plan_resample_add
from revbifpn_kernels.ops.resample.adjoint import plan_resample_adjoint
from revbifpn_kernels.ops.resample.undo import plan_resample_undo
from revbifpn_kernels.warmup import distinct_launches

from .bench_step import ON_GPU
from .lib import record, tables
from .lib.assembly import Listing, inspect_cuda, inspect_hip
from .lib.launches import calls_of_step
from .lib.networks import NETWORKS
from .lib.ptx import count_traffic
from .lib.record import DTYPES as AUTOCAST
from .lib.record import Row
from .lib.workloads import DTYPES, LAYOUTS, LEVELS, cuda_cases
from .lib.workloads import Case as OpCase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Lane instructions per byte of traffic: multiprocessors · lanes · clock / copy bandwidth. sm_90: an
# H200's 132 · 128 at 1.5 GHz over 4.3 TB/s measured. The others from datasheets: A100 108 · 128 at
# 1.41 GHz over 1.75 TB/s; B200 148 · 128 at 1.85 GHz over 7.2; MI300X 304 · 64 at 2.1 GHz over 4.2.
INSTRUCTIONS_PER_BYTE = {"sm_80": 11.1, "sm_90": 5.9, "sm_100": 4.9, "gfx942": 9.7}
# Bytes that each multiprocessor of an H200 moves per clock at its copy bandwidth. Meanwhile its L1
# serves one wavefront: up to 128 bytes of one cache line, or of shared memory.
BYTES_PER_WAVEFRONT = 4.3e12 / (132 * 1.5e9)
# Traffic is counted for the blocks of one image, at most these, before an L2 of a fiftieth of an
# H200's.
MOST_COUNTED, L2_BYTES = 640, 2**20
# Levels 0 to 2 of S6 at 352 pixels, batch 64, from all coarser levels; sides no factor divides.
FUSIONS = {
    "2+4+8": ((64, 320, 88, 88), ((44, 44), (22, 22), (11, 11))),
    "2+4": ((64, 416, 44, 44), ((22, 22), (11, 11))),
    "2": ((64, 528, 22, 22), ((11, 11),)),
    "any": ((64, 48, 57, 57), ((29, 29),)),
}
# Maps inside MBConvs: rows aligned to 16 bytes, and not.
MAPS = {"56x56": (64, 320, 56, 56), "57x57": (64, 48, 57, 57)}
# Images per batch in bench_profile, and in bench_memory.
FEW_IMAGES = 4
# Processes that share the kernels of a step.
SHARES = 2
SCALED = "+scales"
OPS = ("resample_add", "resample_adjoint", "resample_undo")
SCALED_OPS = ("resample_add" + SCALED, "resample_undo" + SCALED)
# Maps that the kernels of the norm_act family read and write.
NORM_PASSES = {
    "batch_statistics": 1,
    "norm_act": 2,
    "norm_act_means": 1,
    "norm_act_sums": 2,
    "norm_act_factor_grads": 2,
    "norm_act_grad": 3,
}


@dataclass(frozen=True)
class Case:
    op: str
    target: str
    dtype: str
    layout: str
    scales: str


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every kernel for every target; mixed precision and the smaller fusions for sm_90 only."""
    fields = (options.ops, options.targets, options.dtypes, options.layouts, options.scales)
    for case in itertools.starmap(Case, itertools.product(*fields)):
        is_norm, is_mixed = case.op in NORM_PASSES, case.dtype == "fp32+bf16"
        if is_norm != (case.scales in MAPS) or (is_norm and is_mixed):
            continue
        is_common = case.scales in ("2+4+8", "any", *MAPS) and not is_mixed
        if case.target == "sm_90" or is_common:
            yield case


def plan_launches(
    op: str, shape: Sequence[int], sizes: Sequence[tuple[int, int]], dtype: str, layout: str
) -> list[tuple[Launch, dict]]:
    """The op's launches and operands, planned on tensors that own no memory of their size."""
    x_dtype, source_dtype = DTYPES[dtype]
    x = _unbacked(shape, x_dtype, layout)
    sources = [_unbacked((*shape[:2], *size), source_dtype, layout) for size in sizes]
    factors = [torch.empty(shape[:2], device="meta")] * (len(sizes) if SCALED in op else 0)
    options = sources, factors, factors, 1.0, "bilinear", None
    if op == "resample_adjoint":
        return [plan_resample_adjoint(x, sources, 1.0, "bilinear")]
    if op.removesuffix(SCALED) == "resample_add":
        return [plan_resample_add(x, x, *options)]
    return plan_resample_undo(x, sources, x, x, *options)


def kernel_name(launch: Launch) -> str:
    """The kernel's, marked where it scales its sources."""
    return launch.kernel.__name__ + (SCALED if launch.constants.get("HAS_SCALES") else "")


def plan_norm_launches(
    op: str, shape: Sequence[int], dtype: str, layout: str
) -> list[tuple[Launch, dict]]:
    """As `plan_launches`, for the norm_act family with all its operands and Hardswish."""
    x = _unbacked(shape, DTYPES[dtype][0], layout)
    channel, plane = (torch.empty(size, device="meta") for size in (shape[1], shape[:2]))
    factors, act = (x, *[channel] * 4), "hardswish"
    if op == "batch_statistics":
        batches = torch.empty((), dtype=torch.int64, device="meta")
        running = channel, channel, batches
        return [plan_batch_statistics((channel, channel), x, 1e-5, *running, 0.1)]
    if op == "norm_act":
        return [forward.plan_norm_act(x, *factors, plane, act)]
    if op == "norm_act_means":
        return [forward.plan_norm_act_means(*factors, act)[:2]]
    if op == "norm_act_sums":
        return [sums.plan_norm_act_sums(x, *factors, act, True)[:2]]
    if op == "norm_act_factor_grads":
        norm = norm_operands(*[channel] * 4)
        return [gradient.plan_factor_grads(channel, channel, x, x, norm, plane, act)]
    of_planes = torch.empty((5, *shape[:2]), device="meta")
    results = x, channel, channel
    return gradient.plan_norm_act_grad(*results, x, *factors, plane, plane, of_planes, act, True)


def _unbacked(shape: Sequence[int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    # Planning reads shapes, strides and the pointer's alignment: a meta tensor's pointer is 0.
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])


def compulsory_bytes(case: Case) -> float:
    """Bytes an op must move, for each element of x."""
    if case.op in NORM_PASSES:
        return NORM_PASSES[case.op] * DTYPES[case.dtype][0].itemsize
    shape, sizes = FUSIONS[case.scales]
    x_bytes, source_bytes = (dtype.itemsize for dtype in DTYPES[case.dtype])
    share = sum(h * w for h, w in sizes) / (shape[2] * shape[3])
    maps = {"resample_add": (2, 1), "resample_adjoint": (1, 1), "resample_undo": (3, 2)}
    full, small = maps[case.op.removesuffix(SCALED)]
    return full * x_bytes + small * share * source_bytes


def instructions_per_element(launch: Launch, listing: Listing, elements: int) -> float | None:
    """Those that all lanes issue, over the elements of x; None where the compiler unrolled."""
    constants, args = launch.constants, launch.args
    if "PIXELS" in constants:
        if constants["UNIT"] == 1:
            return None
        # As many tiles as a chunk has; the last chunk of a plane may have fewer.
        executed = listing.executed_nested(args["images"], args["chunk"])
        return executed * launch.threads * launch.grid[0] / elements
    trips = [] if launch.threads else loop_trips(launch)
    if trips is None:
        return None
    threads = launch.threads or constants["BLOCK"]
    return listing.executed(trips) * threads * launch.grid[0] / elements


def loop_trips(launch: Launch) -> list[int] | None:
    """How often each loop of a kernel runs, in order; None where the sizes' ratio decides."""
    name = launch.kernel.__name__
    if "elements" in name:
        return None if "adjoint" in name else []
    chain = launch.args.get("chain", 1)
    trips = {
        "add": [chain] if chain > 1 else [],
        "adjoint": [chain + 1],
        "undo": [chain, chain + 1],
    }
    return trips[name.split("_")[2]]


def measure(case: Case) -> list[Row]:
    """A row for each launch of the case."""
    target = TARGETS[case.target]
    if case.op in NORM_PASSES:
        shape = MAPS[case.scales]
        planned = plan_norm_launches(case.op, shape, case.dtype, case.layout)
    else:
        shape, sizes = FUSIONS[case.scales]
        planned = plan_launches(case.op, shape, sizes, case.dtype, case.layout)
    budget = compulsory_bytes(case) * INSTRUCTIONS_PER_BYTE[case.target]
    rows = []
    for launch, operands in planned:
        kernel = launch.compile(target, operands)
        listing, resources = (inspect_cuda if target.backend == "cuda" else inspect_hip)(kernel)
        spilled = resources["spill_bytes"]
        per_element = instructions_per_element(launch, listing, math.prod(shape))
        row = {
            "kernel": kernel_name(launch),
            "target": case.target,
            "dtype": case.dtype,
            "layout": case.layout,
            "scales": case.scales,
            **resources,
            "shared_bytes": kernel.metadata.shared,
            "instructions_per_element": "" if per_element is None else f"{per_element:.1f}",
            "budget": f"{budget:.1f}",
            "compulsory_bytes": f"{compulsory_bytes(case):.3f}",
            "load_bytes": listing.widest("LDG", "(global|buffer|flat)_load"),
            "store_bytes": listing.widest("STG", "(global|buffer|flat)_store"),
            **(traffic_columns(launch, kernel, operands, shape) if case.target == "sm_90" else {}),
            "note": f"FAILED: spills {spilled} bytes" if spilled else "",
        }
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def traffic_columns(launch: Launch, kernel, operands: dict, shape: Sequence[int]) -> Row:
    """What a launch's accesses cost: per request of a warp, and per element of x."""
    blocks = math.prod(launch.grid)
    per_image = max(1, blocks // shape[0])
    count = min(per_image, MOST_COUNTED)
    first = min(shape[0] // 2 * per_image, blocks - count)
    counted = range(first, first + count)
    given = {**operands, **launch.args, **launch.constants}
    traffic = count_traffic(kernel, given, launch.grid, counted)
    total, elements = traffic.total, math.prod(shape) * len(counted) / blocks
    dram = traffic.dram_bytes(L2_BYTES)
    wavefronts = total.wavefronts + traffic.shared_wavefronts
    return {
        "sectors_per_request": f"{total.sectors / total.requests:.2f}",
        "fewest_sectors": f"{total.fewest_sectors / total.requests:.2f}",
        "l2_bytes": f"{traffic.l2_bytes() / elements:.3f}",
        "dram_bytes": f"{dram / elements:.3f}",
        "l1_over_dram": f"{wavefronts * BYTES_PER_WAVEFRONT / dram:.2f}",
        "shared_wavefronts": f"{traffic.shared_wavefronts / elements:.4f}",
        "fewest_shared_wavefronts": f"{traffic.fewest_shared_wavefronts / elements:.4f}",
    }


def compile_ahead(op: str, case: OpCase, target: str) -> None:
    """What bench_ops runs on a GPU, into Triton's cache: a GPU's minutes then go into measuring."""
    sizes = [(case.shape[2] >> level, case.shape[3] >> level) for level in LEVELS]
    for launch, operands in plan_launches(op, case.shape, sizes, case.dtype, case.layout):
        launch.compile(TARGETS[target], operands)


@dataclass(frozen=True)
class StepCase:
    """A network's training steps on a GPU."""

    network: str
    batch: int
    dtype: str
    layout: str = "nchw"


def step_cases(is_quick: bool) -> list[StepCase]:
    """Those of bench_step in both layouts; few images, for bench_memory and bench_profile."""
    if is_quick:
        return [StepCase("revbifpn_s0", FEW_IMAGES, "bf16")]
    many = [(name, batch, "bf16") for name, (batch, _) in ON_GPU.items()]
    steps = [StepCase(*network, layout) for network in many for layout in LAYOUTS]
    few = itertools.product(("revbifpn_s0", "revbifpn_s6"), (FEW_IMAGES,), AUTOCAST)
    profiled = StepCase("revbifpn_s0", FEW_IMAGES, "bf16", "channels_last")
    return [profiled, *(StepCase(*network) for network in few), *steps]


def compile_step_ahead(case: StepCase, share: int, target: str) -> None:
    """One of `SHARES` of the kernels of a step, in every mode."""
    arguments = case.network, case.batch, NETWORKS[case.network].side, AUTOCAST[case.dtype]
    modes = {"reversible": True}, {"reversible": False}, {"is_exact": True}
    steps = (calls_of_step(*arguments, layout=case.layout, **mode) for mode in modes)
    launches = distinct_launches([*itertools.chain(*steps)])
    for call, number in itertools.islice(launches, share, None, SHARES):
        launch, operands = call.launches()[number]
        launch.compile(TARGETS[target], operands)


def compile_all_ahead(options: argparse.Namespace) -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        # The largest networks first, which take longest.
        cases = reversed(step_cases(options.quick))
        steps = itertools.product(cases, range(SHARES), options.targets)
        waiting = [pool.submit(compile_step_ahead, *job) for job in steps]
        ops = itertools.product(OPS, () if options.quick else cuda_cases(1), options.targets)
        waiting += [pool.submit(compile_ahead, *job) for job in ops]
        for done in tqdm(as_completed(waiting), total=len(waiting), unit="job"):
            done.result()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = record.parser("kernels", __doc__, on_gpu=False)
    choices = {
        "ops": (*OPS, *SCALED_OPS, *NORM_PASSES),
        "targets": tuple(TARGETS),
        "dtypes": tuple(DTYPES),
        "layouts": tuple(LAYOUTS),
        "scales": (*FUSIONS, *MAPS),
    }
    defaults = choices | {"targets": ("sm_90",), "scales": ("2+4+8", "56x56")}
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=defaults[name])
    parser.add_argument("--ahead", action="store_true",
                        help="only compile what benchmarks run on a GPU, on all cores")  # fmt: skip
    options = record.parse(parser, arguments)
    if options.quick:
        options.dtypes, options.layouts = ("fp32",), ("nchw",)
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.ahead:
        compile_all_ahead(options)
        return 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        chosen = list(cases(options))
        results = tqdm(pool.map(measure, chosen), total=len(chosen), unit="op", disable=None)
        found: dict[tuple[str, ...], Row] = {}
        for row in itertools.chain.from_iterable(results):
            # Off the fast path, undo is the launches of the other two.
            found.setdefault(tuple(row.values())[:5], row)
    rows = record.recorder(options, "kernels", "compiled")
    rows.add(found.values())
    return rows.finish(tables.kernels_table(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
