"""The launches of a network's step, found on fake tensors, in a process that does not interpret."""

import collections
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
# A line per launch: kernel, dtype of its first map, whether it walks through channels_last maps.
SCRIPT = """
import sys, torch
from benchmarks.lib import launches
from benchmarks.lib.launches import launches_of_step
if "every" in sys.argv:  # asks Triton about each launch
    launches._form = lambda *_: object()
layout, reversible = sys.argv[1], sys.argv[2] == "reversible"
for launch, operands in launches_of_step("revbifpn_s0", 2, 64, torch.bfloat16, layout, reversible):
    maps = operands.get("y_ptr", operands.get("grad_ptr", operands.get("x_ptr")))
    is_last = launch.constants.get("CHANNELS_LAST")
    print(launch.kernel.__name__, None if maps is None else maps.dtype, is_last)
launch.compile(__import__("benchmarks.kernels").kernels.TARGETS["sm_90"], operands)
"""


def launches(*options: str) -> list[tuple[str, str, str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *options], cwd=ROOT, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return [tuple(line.split()) for line in found.stdout.splitlines()]


@pytest.mark.parametrize(("layout", "mode"), [("nchw", "stored"), ("channels_last", "reversible")])
def test_every_kernel_of_a_step(layout, mode):
    found = launches(layout, mode)
    kernels = collections.Counter(kernel for kernel, _, _ in found)
    families = {
        *(f"_resample_{op}_cells_kernel" for op in ("add", "adjoint")),
        *(f"_norm_act{part}_kernel" for part in ("", "_means", "_sums", "_totals", "_grad")),
        *(f"_batch_statistics{part}_kernel" for part in ("", "_combine")),
        *("_norm_factors_kernel", "_squeeze_kernel", "_excite_kernel", "_excite_backward_kernel"),
        *("_squeeze_backward_kernel", "_squeeze_excite_results_kernel"),
    }
    undone = {"_resample_undo_cells_kernel"} if mode == "reversible" else set()
    assert set(kernels) == families | undone
    # Inside the transforms autocast decides, between them the streams keep float32.
    dtypes = {kernel: {dtype for name, dtype, _ in found if name == kernel} for kernel in kernels}
    assert dtypes["_norm_act_grad_kernel"] == {"torch.bfloat16"}
    assert dtypes["_resample_add_cells_kernel"] == {"torch.float32"}
    is_last = {flag for kernel, _, flag in found if kernel == "_norm_act_grad_kernel"}
    assert is_last == {str(layout == "channels_last")}
    # One kernel per activation, and per alignment and tile of its maps; not one per map.
    assert 4 <= kernels["_norm_act_grad_kernel"] <= 40


@pytest.mark.slow
def test_no_kernel_is_skipped():
    assert launches("nchw", "stored") == launches("nchw", "stored", "every")
