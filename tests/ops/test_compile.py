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


def run_apart(*command):
    """The finished process: one of its own, because interpreted kernels cannot be compiled."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def compile_kernels(tmp_path, *options):
    """The rows of `benchmarks.kernels` for contiguous fp32 and bf16 maps."""
    output = tmp_path / "kernels.csv"
    command = ["-m", "benchmarks.kernels", "--output", str(output), "--layouts", "nchw"]
    command += ["--dtypes", "fp32", "bf16", "--scales", "2+4+8", "any", "57x57"]
    result = run_apart(*command, *options)
    assert output.exists(), result.stderr
    with output.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(tmp_path, target):
    rows = compile_kernels(tmp_path, "--targets", target)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["kernel"]: row["spill_bytes"] for row in rows} == dict.fromkeys(KERNELS, "0")


def test_aligned_rows_move_16_bytes_within_the_instruction_budget(tmp_path):
    rows = compile_kernels(tmp_path, "--targets", "sm_90", "--scales", "2+4+8")
    assert len(rows) == 2 * 5
    for row in rows:
        assert row["load_bytes"] == "16", row
        assert float(row["instructions_per_element"]) <= 1.25 * float(row["budget"]), row


def test_dense_maps_move_16_bytes_within_the_instruction_budget(tmp_path):
    formats = ["--layouts", "nchw", "channels_last"]
    rows = compile_kernels(
        tmp_path, "--targets", "sm_90", "--ops", *NORM_OPS, "--scales", "56x56", *formats
    )
    assert len(rows) == 4 * 7
    for row in rows:
        if "combine" not in row["kernel"] and "totals" not in row["kernel"]:
            assert row["load_bytes"] == "16", row
        if row["kernel"] in ("_norm_act_kernel", "_norm_act_grad_kernel"):
            assert row["store_bytes"] == "16", row
        assert row["spill_bytes"] == "0", row
        assert float(row["instructions_per_element"]) <= 1.25 * float(row["budget"]), row


def test_sizes_of_1_compile():
    """Triton turns arguments of 1 into constants, which the interpreter does not.

    Squeeze-excite's kernels, for every target, too.
    """
    result = run_apart("tests/compile_corners.py")
    assert result.returncode == 0, result.stderr
    kernels = [line.rsplit(maxsplit=1)[-1] for line in result.stdout.splitlines()]
    assert {kernel for kernel in KERNELS if "cells" not in kernel} <= set(kernels)
    assert SQUEEZE_EXCITE_KERNELS <= set(kernels)
