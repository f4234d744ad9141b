"""Compiles the kernels for sizes of 1, which Triton makes constants. Run in its own process."""

import itertools

import torch
from triton.backends.compiler import GPUTarget

from benchmarks.kernels import NORM_PASSES, kernel_name, plan_norm_launches
from revbifpn_kernels.ops.resample_add import plan_resample_add
from revbifpn_kernels.ops.resample_adjoint import plan_resample_adjoint
from revbifpn_kernels.ops.resample_undo import plan_resample_undo

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


def compile_all(name, variant, launches):
    for launch, operands in launches:
        launch.compile(GPUTarget("cuda", 90, 32), operands)
        print(f"{name} {variant} {kernel_name(launch)}")


def main():
    formats = (torch.contiguous_format, torch.channels_last)
    variants = itertools.product(("bilinear", "nearest"), formats, (None, 2.0**-10))
    for (name, corner), variant in itertools.product(CORNERS.items(), list(variants)):
        compile_all(name, variant, corner_launches(*corner, *variant))
    for (name, (shape, _)), layout in itertools.product(CORNERS.items(), ("nchw", "channels_last")):
        compile_all(name, layout, norm_launches(shape, layout))


if __name__ == "__main__":
    main()
