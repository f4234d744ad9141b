"""The calls and launches of a network's step, found on fake tensors."""

import collections

import pytest
import torch
from helpers import IS_INTERPRETED

from benchmarks.lib.launches import calls_of_step
from revbifpn_kernels.warmup import distinct_launches, kernel_key

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")


def step(layout, mode):
    return calls_of_step("revbifpn_s0", 2, 64, torch.bfloat16, layout, mode == "reversible")


def launches(layout, mode):
    """(kernel, dtype of its first map, whether it walks through channels_last maps) of each."""
    for call, number in distinct_launches(step(layout, mode)):
        launch, operands = call.launches()[number]
        maps = operands.get("y_ptr", operands.get("grad_ptr", operands.get("x_ptr")))
        is_last = launch.constants.get("CHANNELS_LAST")
        yield launch.kernel.__name__, None if maps is None else maps.dtype, is_last


@pytest.mark.parametrize(("layout", "mode"), [("nchw", "stored"), ("channels_last", "reversible")])
def test_every_kernel_of_a_step(layout, mode):
    found = list(launches(layout, mode))
    kernels = collections.Counter(kernel for kernel, _, _ in found)
    families = {
        *(f"_resample_{op}_cells_kernel" for op in ("add", "adjoint")),
        *(f"_norm_act{part}_kernel" for part in ("", "_grad", "_factor_grads", "_gates")),
        *(f"_norm_act_excite_{part}_kernel" for part in ("sums", "results")),
        "_batch_statistics_kernel",
    }
    undone = {"_resample_undo_cells_kernel"} if mode == "reversible" else set()
    assert set(kernels) == families | undone
    # Inside the transforms autocast decides, between them the streams keep float32.
    dtypes = {kernel: {dtype for name, dtype, _ in found if name == kernel} for kernel in kernels}
    assert dtypes["_norm_act_grad_kernel"] == {torch.bfloat16}
    assert dtypes["_resample_add_cells_kernel"] == {torch.float32}
    is_last = {flag for kernel, _, flag in found if kernel == "_norm_act_grad_kernel"}
    assert is_last == {layout == "channels_last"}
    # One kernel per activation, and per alignment and tile of its maps; not one per map.
    assert 4 <= kernels["_norm_act_grad_kernel"] <= 40


@pytest.mark.slow
def test_no_kernel_is_skipped():
    calls = step("nchw", "stored")
    every = {kernel_key(*planned) for call in calls for planned in call.launches()}
    found = (call.launches()[number] for call, number in distinct_launches(calls))
    assert {kernel_key(*planned) for planned in found} == every
