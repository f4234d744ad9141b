"""The weights' gradient of depthwise convolutions on CPUs, beside PyTorch's own.

At every (kernel, stride) of RevBiFPN-S0 at 224 pixels, batch 4, channels_last. GB/s count x and the
result's gradient once: what must move.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from revbifpn_kernels.ops.depthwise_weight_grad import depthwise_weight_grad

from . import harness
from .harness import Row

RESULTS = Path(__file__).parent / "results"
CASES = (  # channels, side, kernel, stride
    (24, 56, 3, 1),
    (48, 56, 3, 2),
    (48, 56, 5, 1),
    (48, 56, 7, 4),
    (48, 56, 15, 8),
    (32, 28, 5, 1),
    (80, 14, 5, 1),
    (160, 7, 5, 1),
)
BATCH = 4


def calls_of(channels: int, side: int, kernel: int, stride: int) -> tuple[dict, int]:
    """Ours and PyTorch's, and the bytes that must move."""
    padding = (kernel - 1) // 2
    x = torch.randn(BATCH, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding, groups=channels)
    grad = torch.randn_like(y)
    sizes = {"kernel_size": kernel, "stride": stride, "padding": padding}
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: depthwise_weight_grad(x, grad, **sizes),
        "torch": lambda: torch.autograd.grad(y, weight, grad, retain_graph=True)[0],
    }
    return calls, x.nbytes + grad.nbytes


def bench(case: tuple[int, int, int, int], machine: Row) -> list[Row]:
    channels, side, kernel, stride = case
    calls, size = calls_of(*case)
    ours, theirs = calls["ours"](), calls["torch"]()
    is_right = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    times = harness.measure_interleaved(
        calls, harness.clock_for("cpu"), seconds=2.0, rounds=(9, 99)
    )
    rows = []
    for provider, timing in times.items():
        is_wrong = provider == "ours" and not is_right
        row = {
            **machine,
            "op": "depthwise_weight_grad",
            "provider": provider,
            "mode": f"kernel {kernel}, stride {stride}",
            "dtype": "fp32",
            "shape": f"{BATCH}x{channels}x{side}x{side}",
            "layout": "channels_last",
            "threads": str(torch.get_num_threads()),
            "note": "WRONG" if is_wrong else "",
        }
        if not is_wrong:
            row |= {"ms_p20": f"{timing.p20:.4f}", "ms_p50": f"{timing.p50:.4f}"}
            row |= {"ms_p80": f"{timing.p80:.4f}", "gbps": f"{size / timing.p50 / 1e6:.2f}"}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_depthwise", description=__doc__
    ).parse_args(arguments)
    machine = harness.describe_machine("cpu")
    path = harness.result_path(RESULTS, machine)
    rows = [row for case in CASES for row in bench(case, machine)]
    harness.record(path, rows)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        times = float(theirs["ms_p50"]) / float(ours["ms_p50"]) if not ours["note"] else 0.0
        print(f"{ours['shape']:14} {ours['mode']:20} {times:6.1f} x PyTorch {ours['note']}")
    return int(any(row["note"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
