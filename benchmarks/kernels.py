"""What the compiler made of every Triton kernel, for GPUs that need not be there.

    python -m benchmarks.kernels [--targets sm_90 ...] [--output FILE] (and more: --help)

Registers, spills, shared memory, widest accesses and machine instructions per element of x, beside
the budget: what a GPU can issue while it moves the op's compulsory bytes at its copy speed.
"""

import argparse
import csv
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from revbifpn_kernels.ops.launch import Launch
from revbifpn_kernels.ops.norm_act import forward, gradient
from revbifpn_kernels.ops.norm_act.statistics import plan_batch_statistics
from revbifpn_kernels.ops.resample.add import plan_resample_add
from revbifpn_kernels.ops.resample.adjoint import plan_resample_adjoint
from revbifpn_kernels.ops.resample.undo import plan_resample_undo
from revbifpn_kernels.ops.squeeze_excite.gates import (
    plan_squeeze_excite_gates,
    plan_squeeze_excite_gates_backward,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Lane instructions a byte of traffic: multiprocessors · lanes · clock / copy bandwidth. sm_90: an
# H200's 132 · 128 at 1.5 GHz over 4.3 TB/s measured. The others from datasheets: A100 108 · 128 at
# 1.41 GHz over 1.75 TB/s; B200 148 · 128 at 1.85 GHz over 7.2; MI300X 304 · 64 at 2.1 GHz over 4.2.
INSTRUCTIONS_PER_BYTE = {"sm_80": 11.1, "sm_90": 5.9, "sm_100": 4.9, "gfx942": 9.7}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32+bf16": (torch.float32, torch.bfloat16),
}
# Levels 0 to 2 of S6 at 352 pixels, batch 64, from all coarser levels; sides no factor divides.
FUSIONS = {
    "2+4+8": ((64, 320, 88, 88), ((44, 44), (22, 22), (11, 11))),
    "2+4": ((64, 416, 44, 44), ((22, 22), (11, 11))),
    "2": ((64, 528, 22, 22), ((11, 11),)),
    "any": ((64, 48, 57, 57), ((29, 29),)),
}
# Maps inside MBConvs: rows aligned to 16 bytes, and not.
MAPS = {"56x56": (64, 320, 56, 56), "57x57": (64, 48, 57, 57)}
SCALED = "+scales"
OPS = ("resample_add", "resample_adjoint", "resample_undo")
SCALED_OPS = ("resample_add" + SCALED, "resample_undo" + SCALED)
# Maps that an op of the norm_act family reads and writes.
NORM_PASSES = {
    "batch_statistics": 1,
    "norm_act": 2,
    "norm_act_means": 1,
    "norm_act_sums": 2,
    "norm_act_grad": 3,
}
COLUMNS = (
    "kernel target dtype layout scales registers spill_bytes shared_bytes instructions_per_element "
    "budget load_bytes store_bytes"
).split()


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
        return plan_batch_statistics(channel, channel, x, 1e-5, *running, 0.1)
    if op == "norm_act":
        return [forward.plan_norm_act(x, *factors, plane, act)]
    if op == "norm_act_means":
        return [forward.plan_norm_act_means(*factors, act)[:2]]
    if op == "norm_act_sums":
        return [gradient.plan_norm_act_sums(x, *factors, act, True)[:2]]
    sums = torch.empty((5, *shape[:2]), device="meta")
    results = x, channel, channel
    return gradient.plan_norm_act_grad(*results, x, *factors, plane, plane, sums, act, True)


def plan_squeeze_excite_launches(sizes: tuple[int, int, int]) -> list[tuple[Launch, dict]]:
    """Those of both ops, for N, C and hidden; they move no maps, so they are no case."""
    N, C, hidden = sizes
    shapes = (N, C), (hidden, C, 1, 1), (hidden,), (C, hidden, 1, 1), (C,)
    network = [torch.empty(shape, device="meta") for shape in shapes]
    means, values = network[0], torch.empty((N, hidden), device="meta")
    scratch, act = (values, values, values, means), "hardswish"
    return [
        *plan_squeeze_excite_gates(means, values, *network, act),
        *plan_squeeze_excite_gates_backward(network, scratch, means, *network, act),
    ]


def _unbacked(shape: Sequence[int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    # Planning reads shapes, strides and the pointer's alignment: a meta tensor's pointer is 0.
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=fmt)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its opcode with modifiers, and the label it may jump to."""

    opcode: str
    label: str | None


@dataclass(frozen=True)
class Listing:
    """A disassembly: instructions in order, and the position each label stands at."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self, count: int) -> list[tuple[int, int]]:
        """(first, last) instruction of the `count` longest disjoint backward jumps, in order.

        Shorter ones are branches that rejoin, or the trap at the end.
        """
        jumps = [
            (self.labels[instruction.label], position)
            for position, instruction in enumerate(self.instructions)
            if self.labels.get(instruction.label, position) < position
        ]
        jumps.sort(key=lambda jump: jump[0] - jump[1])
        chosen = []
        for first, last in jumps:
            if len(chosen) < count and all(last < a or first > b for a, b in chosen):
                chosen.append((first, last))
        return sorted(chosen)

    def executed(self, trips: list[int]) -> int:
        """Instructions a lane issues, both ways of a branch, if the loops run `trips` times."""
        repeats = [1] * len(self.instructions)
        loops = self.loops(len(trips))
        for (first, last), count in zip(loops, trips, strict=True):
            for position in range(first, last + 1):
                repeats[position] *= count
        return sum(
            count
            for count, instruction in zip(repeats, self.instructions, strict=True)
            if not instruction.opcode.startswith(("NOP", "s_nop"))
        )

    def executed_nested(self, outer: int, inner: int) -> int:
        """As `executed`, for a loop that runs `outer` times around one that runs `inner` times."""
        ((first, last),) = self.loops(1)
        labels = {label: at for label, at in self.labels.items() if first < at <= last}
        ((start, end),) = Listing(self.instructions[:last], labels).loops(1)
        around = last - first + 1
        within = end - start + 1
        return self.executed([]) + (outer - 1) * around + outer * (inner - 1) * within

    def widest(self, *patterns: str) -> int:
        """Bytes of the widest access whose opcode matches one of `patterns`."""
        opcodes = {i.opcode for i in self.instructions}
        return max(
            (_access_bytes(o) for o in opcodes if any(re.match(p, o) for p in patterns)), default=0
        )


def _access_bytes(opcode: str) -> int:
    if opcode.startswith(("LDG", "STG")):
        bits = re.search(r"\.(128|64|U16|S16|U8|S8|16)\b", opcode)
        return int(re.sub(r"\D", "", bits.group(1))) // 8 if bits else 4
    for suffix, size in (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4)):
        if suffix in opcode:
            return size
    return 2


def _parse(text: str, label_pattern: str, code_pattern: str) -> Listing:
    """Labels are what `label_pattern` finds, at a line's start or in an instruction's operands."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(rf"\s*({label_pattern}):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(code_pattern, line):
            target = re.search(label_pattern, code.group(2))
            instructions.append(Instruction(code.group(1), target.group(0) if target else None))
    return Listing(instructions, labels)


def parse_sass(text: str) -> Listing:
    """nvdisasm's listing."""
    code = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)"
    return _parse(text, r"\.L_x_\d+", code)


def parse_amdgcn(text: str) -> Listing:
    """LLVM's assembly for AMD GPUs."""
    return _parse(text.split(".Lfunc_end")[0], r"\.LBB\w+", r"\t([svgbdf][a-z]*_\w+)\s*(.*)")


def inspect_cuda(kernel) -> tuple[Listing, dict]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [tools / "nvdisasm", "-c", file.name],
                [tools / "cuobjdump", "--dump-resource-usage", file.name],
            )
        )
    resources = {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
    }
    return parse_sass(sass), resources


def inspect_hip(kernel) -> tuple[Listing, dict]:
    text = kernel.asm["amdgcn"]
    resources = {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
        "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1)),
    }
    return parse_amdgcn(text), resources


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
    """Those a lane issues for each element of x that it owns; None where the compiler unrolled."""
    constants, args = launch.constants, launch.args
    if "PIXELS" in constants:
        if constants["UNIT"] == 1:
            return None
        # As many tiles as a chunk has; the last chunk of a plane may have fewer.
        executed = listing.executed_nested(args["images"], args["chunk"])
        return executed * launch.threads * launch.grid[0] / elements
    if launch.threads:
        return listing.executed([]) * launch.threads * launch.grid[0] / elements
    trips = loop_trips(launch)
    cell = constants.get("CELL_H", 1) * constants.get("CELL_W", 1) * args.get("chain", 1)
    return None if trips is None else listing.executed(trips) / cell


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


def measure(case: Case) -> list[dict]:
    """A row for each launch of the case."""
    target = TARGETS[case.target]
    rows = []
    if case.op in NORM_PASSES:
        shape = MAPS[case.scales]
        planned = plan_norm_launches(case.op, shape, case.dtype, case.layout)
    else:
        shape, sizes = FUSIONS[case.scales]
        planned = plan_launches(case.op, shape, sizes, case.dtype, case.layout)
    for launch, operands in planned:
        kernel = launch.compile(target, operands)
        listing, resources = (inspect_cuda if target.backend == "cuda" else inspect_hip)(kernel)
        per_element = instructions_per_element(launch, listing, math.prod(shape))
        budget = compulsory_bytes(case) * INSTRUCTIONS_PER_BYTE[case.target]
        rows.append(
            {
                "kernel": kernel_name(launch),
                "target": case.target,
                "dtype": case.dtype,
                "layout": case.layout,
                "scales": case.scales,
                **resources,
                "shared_bytes": kernel.metadata.shared,
                "instructions_per_element": "" if per_element is None else round(per_element, 1),
                "budget": round(budget, 1),
                "load_bytes": listing.widest("LDG", "(global|buffer|flat)_load"),
                "store_bytes": listing.widest("STG", "(global|buffer|flat)_store"),
            }
        )
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    choices = {
        "ops": (*OPS, *SCALED_OPS, *NORM_PASSES),
        "targets": tuple(TARGETS),
        "dtypes": tuple(DTYPES),
        "layouts": ("nchw", "channels_last"),
        "scales": (*FUSIONS, *MAPS),
    }
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.csv"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    chosen = list(cases(options))
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for case_rows in tqdm(pool.map(measure, chosen), total=len(chosen), unit="kernel"):
            rows += case_rows
    # Off the fast path, undo is the launches of the other two.
    rows = list({tuple(row.values())[:5]: row for row in reversed(rows)}.values())[::-1]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{str(row[name]):>{max(len(name), 6)}}" for name in COLUMNS))
    spilling = [row for row in rows if row["spill_bytes"]]
    print(f"{len(rows)} kernels, {len(spilling)} with spills, in {options.output}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
