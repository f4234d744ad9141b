"""Compiles on all cores what bench_ops runs on a GPU: `python -m benchmarks.compile_ahead`.

A kernel takes seconds, and bench_ops meets them one by one. Compiled here first, they come from
Triton's cache, and a lent GPU's minutes go into measuring.
"""

import argparse
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm

from .kernels import OPS, TARGETS, plan_launches
from .lib.workloads import LEVELS, Case, cuda_cases


def compile_op(op: str, case: Case, target: str) -> None:
    sizes = [(case.shape[2] >> level, case.shape[3] >> level) for level in LEVELS]
    for launch, operands in plan_launches(op, case.shape, sizes, case.dtype, case.layout):
        launch.compile(TARGETS[target], operands)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_ahead", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    target = parser.parse_args(arguments).target
    jobs = [(op, case, target) for op, case in itertools.product(OPS, cuda_cases(1))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for done in tqdm([pool.submit(compile_op, *job) for job in jobs], unit="kernel"):
            done.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
