"""Compiles kernels. Run in a process of its own, because interpreted kernels cannot be compiled.

python tests/compile_kernels.py rows OPTIONS  # those of benchmarks.kernels: prints its CSV rows
python tests/compile_kernels.py corners       # sizes of 1, which Triton makes constants
"""

import csv
import sys

import torch
from squeeze_excite_cases import planned_launches

from benchmarks import kernels
from benchmarks.kernels import (
    NORM_PASSES,
    TARGETS,
    inspect_cuda,
    inspect_hip,
    kernel_name,
    plan_norm_launches,
)
from revbifpn_kernels.ops.norm_act.factors import plan_norm_factors
from revbifpn_kernels.ops.resample.add import plan_resample_add
from revbifpn_kernels.ops.resample.adjoint import plan_resample_adjoint
from revbifpn_kernels.ops.resample.undo import plan_resample_undo

# Shape of x, sizes of the sources.
CORNERS = {
    "all sizes 1": ((1, 1, 1, 1), [(1, 1)]),
    "one row": ((2, 3, 1, 7), [(1, 3), (1, 7)]),
    "one column": ((2, 3, 7, 1), [(3, 1), (7, 1)]),
    "batch 1, any sizes": ((1, 3, 13, 11), [(5, 7), (13, 11), (26, 33)]),
    "batch 1, one cell": ((1, 1, 2, 2), [(1, 1), (2, 2)]),
    "batch 64, any sizes": ((64, 48, 57, 57), [(29, 29), (1, 1)]),
}


def corner_launches(shape, sizes, mode, memory_format, lattice):
    def maps(*sides):
        shape_of_maps = (*shape[:2], *sides)
        return torch.empty(shape_of_maps, device="meta", memory_format=memory_format)

    x, sources = maps(*shape[2:]), [maps(*size) for size in sizes]
    yield plan_resample_adjoint(x, sources, 1.0, mode)
    factors = [torch.empty(shape[:2], device="meta")] * len(sources)
    for lists in ((sources, [], []), (sources, factors, factors)):
        yield plan_resample_add(x, x, *lists, 1.0, mode, lattice)
        yield from plan_resample_undo(x, sources, x, x, *lists, 1.0, mode, lattice)


def norm_launches(shape, layout):
    for op in NORM_PASSES:
        yield from plan_norm_launches(op, shape, "fp32", layout)
    planes, channels, samples = (
        torch.empty(s, device="meta") for s in (shape[:2], shape[1], shape[0])
    )
    yield plan_norm_factors(planes, planes, samples, *[channels] * 4)
    yield plan_norm_factors(planes, planes, None, channels, channels, None, None)


# N, C, hidden.
SQUEEZES = {"all sizes 1": (1, 1, 1), "odd": (3, 35, 9), "S6": (64, 2112, 132)}


def compile_all(name, variant, launches, target="sm_90"):
    kernels = []
    for launch, operands in launches:
        kernels.append(launch.compile(TARGETS[target], operands))
        print(f"{name} {variant} {kernel_name(launch)}")
    return kernels


def compile_squeeze_excite(name, target):
    inspect = inspect_cuda if target.startswith("sm") else inspect_hip
    for kernel in compile_all(name, target, planned_launches(SQUEEZES[name]), target):
        _, resources = inspect(kernel)
        assert resources["spill_bytes"] == 0, (name, target, kernel.name, resources)


def print_rows(arguments):
    cases = kernels.cases(kernels.parse(arguments))
    rows = [row for case in cases for row in kernels.measure(case)]
    writer = csv.DictWriter(sys.stdout, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def print_corners():
    modes, lattices = ("bilinear", "nearest"), (None, 2.0**-10)
    formats = (torch.contiguous_format, torch.channels_last)
    for k, (name, corner) in enumerate(CORNERS.items()):
        # Modes, formats and lattices take turns.
        variant = modes[k % 2], formats[k // 2 % 2], lattices[k // 3]
        compile_all(name, variant, corner_launches(*corner, *variant))
        layout = ("nchw", "channels_last")[k % 2]
        compile_all(name, layout, norm_launches(corner[0], layout))
    for name in ("all sizes 1", "S6"):
        compile_squeeze_excite(name, "sm_90")
    for target in TARGETS:
        compile_squeeze_excite("odd", target)


if __name__ == "__main__":
    print_rows(sys.argv[2:]) if sys.argv[1] == "rows" else print_corners()
