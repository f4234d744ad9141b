"""Every kernel, compiled for GPUs that need not be there: no spills, and within the budgets."""

import pytest
import torch
from helpers import IS_INTERPRETED
from squeeze_excite_cases import planned_fused_launches, planned_launches

from benchmarks import kernels
from benchmarks.kernels import TARGETS, inspect_cuda, inspect_hip
from revbifpn_kernels.ops.norm_act.factors import plan_norm_factors

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")
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
    "_norm_act_kernel",
    "_norm_act_means_kernel",
    "_norm_act_sums_kernel",
    "_norm_act_factor_grads_kernel",
    "_norm_act_totals_kernel",
    "_norm_act_grad_kernel",
}
NORM_ENDS = "", "_means", "_sums", "_factor_grads", "_grad"
NORM_OPS = ["batch_statistics", *("norm_act" + end for end in NORM_ENDS)]


def compile_rows(target, dtype, *options):
    """The rows of `benchmarks.kernels`, without spills in any kernel."""
    chosen = kernels.parse(["--targets", target, "--dtypes", dtype, *options])
    rows = [row for case in kernels.cases(chosen) for row in kernels.measure(case)]
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
        if "totals" not in row["kernel"]:
            assert row["load_bytes"] == "16", row
        if row["kernel"] in ("_norm_act_kernel", "_norm_act_grad_kernel"):
            assert row["store_bytes"] == "16", row
        assert float(row["instructions_per_element"]) <= 1.25 * float(row["budget"]), row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_small_kernels_compile_without_spills(target):
    """Squeeze-excite's and the factors of norms, which have no rows of their own."""
    planes, channels, samples = (torch.empty(s, device="meta") for s in ((3, 35), 35, 3))
    factors = plan_norm_factors(planes, planes, samples, *[channels] * 4)
    inspect = inspect_cuda if target.startswith("sm") else inspect_hip
    networks = [*planned_launches((3, 35, 9)), *planned_fused_launches((64, 256, 128))]
    for launch, operands in [*networks, factors]:
        _, resources = inspect(launch.compile(TARGETS[target], operands))
        assert resources["spill_bytes"] == 0, (launch.kernel.__name__, resources)
