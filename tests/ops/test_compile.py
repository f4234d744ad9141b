"""Every kernel, compiled for GPUs that need not be there: catches what the interpreter forgives."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "_resample_add_cells_kernel",
    "_resample_add_elements_kernel",
    "_resample_adjoint_cells_kernel",
    "_resample_adjoint_elements_kernel",
    "_resample_undo_cells_kernel",
    "_resample_add_cells_kernel+scales",
    "_resample_add_elements_kernel+scales",
    "_resample_undo_cells_kernel+scales",
    "_batch_statistics_kernel",
    "_batch_statistics_combine_kernel",
    "_norm_act_kernel",
    "_norm_act_means_kernel",
    "_norm_act_sums_kernel",
    "_norm_act_totals_kernel",
    "_norm_act_grad_kernel",
}
SQUEEZE_EXCITE_KERNELS = {
    "_squeeze_kernel",
    "_excite_kernel",
    "_excite_backward_kernel",
    "_squeeze_backward_kernel",
    "_squeeze_excite_results_kernel",
}
NORM_OPS = ["batch_statistics", *("norm_act" + end for end in ("", "_means", "_sums", "_grad"))]


def run_apart(*arguments):
    """What `compile_kernels.py` prints: interpreted kernels cannot be compiled in this process."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "tests/compile_kernels.py", *arguments]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def compile_rows(target, dtype, *options):
    """The rows of `benchmarks.kernels`, without spills in any kernel."""
    lines = run_apart("rows", "--targets", target, "--dtypes", dtype, *options)
    rows = list(csv.DictReader(lines))
    assert not [row for row in rows if row["spill_bytes"] != "0"]
    return rows


@pytest.mark.parametrize(
    ("target", "dtype", "fusion"),
    [
        ("sm_90", "fp32", "2"),
        pytest.param("sm_80", "bf16", "2+4+8", marks=pytest.mark.slow),
        pytest.param("sm_100", "fp32", "2+4+8", marks=pytest.mark.slow),
        pytest.param("gfx942", "bf16", "2+4+8", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_without_spills(target, dtype, fusion):
    rows = compile_rows(target, dtype, "--layouts", "nchw", "--scales", fusion, "any", "57x57")
    assert {row["kernel"] for row in rows} == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", "bf16"), ("sm_100", "fp32")])
def test_the_largest_kernels_compile_without_spills(target, dtype):
    """Undo holds what add and adjoint are made of."""
    ops = ["--ops", "resample_undo", "resample_undo+scales", "norm_act_sums", "norm_act_grad"]
    assert (
        len(compile_rows(target, dtype, "--layouts", "nchw", *ops, "--scales", "2+4+8", "57x57"))
        == 5
    )


@pytest.mark.slow
def test_aligned_rows_move_16_bytes_within_the_instruction_budget():
    """And lanes exchange values without shared memory, with registers left for 20 warps."""
    rows = compile_rows("sm_90", "fp32", "--layouts", "nchw", "--scales", "2+4+8")
    assert len(rows) == 5
    for row in rows:
        assert row["load_bytes"] == "16" and row["shared_bytes"] == "0", row
        assert int(row["registers"]) <= 96, row
        assert float(row["instructions_per_element"]) <= 1.25 * float(row["budget"]), row


@pytest.mark.slow
def test_dense_maps_move_16_bytes_within_the_instruction_budget():
    options = ["--ops", *NORM_OPS, "--scales", "56x56", "--layouts", "channels_last"]
    rows = compile_rows("sm_90", "bf16", *options)
    assert len(rows) == 7
    for row in rows:
        if "combine" not in row["kernel"] and "totals" not in row["kernel"]:
            assert row["load_bytes"] == "16", row
        if row["kernel"] in ("_norm_act_kernel", "_norm_act_grad_kernel"):
            assert row["store_bytes"] == "16", row
        assert float(row["instructions_per_element"]) <= 1.25 * float(row["budget"]), row


@pytest.mark.slow
def test_sizes_of_1_compile():
    """Triton turns arguments of 1 into constants, which the interpreter does not.

    Squeeze-excite's kernels, for every target, too.
    """
    kernels = {line.rsplit(maxsplit=1)[-1] for line in run_apart("corners")}
    assert {kernel for kernel in KERNELS if "cells" not in kernel} <= kernels
    assert SQUEEZE_EXCITE_KERNELS | {"_norm_factors_kernel"} <= kernels
