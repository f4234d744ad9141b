"""Compiles the kernels for sizes of 1, which Triton makes constants. Run in its own process.

Those of squeeze-excite for every target: `benchmarks.kernels` has them not, they move no maps.
"""

import itertools

import torch

from benchmarks.kernels import (
    NORM_PASSES,
    TARGETS,
    inspect_cuda,
    inspect_hip,
    kernel_name,
    plan_norm_launches,
    plan_squeeze_excite_launches,
)
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


# N, C, hidden.
SQUEEZES = {"all sizes 1": (1, 1, 1), "odd": (3, 35, 9), "S0": (64, 320, 20), "S6": (64, 2112, 132)}


def compile_all(name, variant, launches, target="sm_90"):
    kernels = []
    for launch, operands in launches:
        kernels.append(launch.compile(TARGETS[target], operands))
        print(f"{name} {variant} {kernel_name(launch)}")
    return kernels


def compile_squeeze_excite(name, target):
    inspect = inspect_cuda if target.startswith("sm") else inspect_hip
    for kernel in compile_all(name, target, plan_squeeze_excite_launches(SQUEEZES[name]), target):
        _, resources = inspect(kernel)
        assert resources["spill_bytes"] == 0, (name, target, kernel.name, resources)


def main():
    formats = (torch.contiguous_format, torch.channels_last)
    variants = itertools.product(("bilinear", "nearest"), formats, (None, 2.0**-10))
    for (name, corner), variant in itertools.product(CORNERS.items(), list(variants)):
        compile_all(name, variant, corner_launches(*corner, *variant))
    for (name, (shape, _)), layout in itertools.product(CORNERS.items(), ("nchw", "channels_last")):
        compile_all(name, layout, norm_launches(shape, layout))
    for name in SQUEEZES:
        compile_squeeze_excite(name, "sm_90")
    for target in TARGETS:
        compile_squeeze_excite("S0", target)


if __name__ == "__main__":
    main()
