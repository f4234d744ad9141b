"""Depthwise convolutions on CPUs: PyTorch's beside what must move, and ours where we have one.

At every (kernel, stride) of RevBiFPN-S0 at 224 pixels, batch 4, in both layouts and dtypes. GB/s
count x and the result, or its gradient, once: share_of_copy is of a copy of x in the same turns.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from revbifpn_kernels.ops.conv.depthwise import depthwise_input_grad, depthwise_weight_grad

from .lib import harness
from .lib.harness import Row
from .lib.workloads import LAYOUTS

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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 4
OPS = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True)
class Convolution:
    """Maps, weights and the result's gradient of one case."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    stride: int
    padding: int

    @classmethod
    def make(cls, case: tuple[int, ...], dtype: str, layout: str) -> "Convolution":
        channels, side, kernel, stride = case
        sides = {"dtype": DTYPES[dtype]}
        x = torch.randn(BATCH, channels, side, side, **sides).to(memory_format=LAYOUTS[layout])
        weight = torch.randn(channels, 1, kernel, kernel, **sides)
        y = F.conv2d(x, weight, None, stride, kernel // 2, groups=channels)
        return cls(x, weight, torch.randn_like(y), stride, kernel // 2)

    def gradient(self, wants: str) -> Tensor:
        """PyTorch's."""
        is_wanted = [wants == "input_grad", wants == "weight_grad", False]
        stride, padding = [self.stride] * 2, [self.padding] * 2
        results = torch.ops.aten.convolution_backward(
            self.grad, self.x, self.weight, None, stride, padding, [1, 1], False, [0, 0],
            self.x.shape[1], is_wanted,
        )  # fmt: skip
        return results[is_wanted.index(True)]

    def calls(self, op: str) -> dict[str, Callable[[], Tensor]]:
        """By provider. Ours is for channels_last."""
        sizes = {"stride": self.stride, "padding": self.padding}
        groups = self.x.shape[1]
        if op == "forward":
            return {"torch": lambda: F.conv2d(self.x, self.weight, None, **sizes, groups=groups)}
        calls: dict[str, Callable[[], Tensor]] = {"torch": lambda: self.gradient(op)}
        if self.x.stride(1) == 1 and op == "input_grad":
            calls["ours"] = lambda: depthwise_input_grad(
                self.grad, self.weight, self.x.shape[2:], **sizes
            )
        elif self.x.stride(1) == 1:
            calls["ours"] = lambda: depthwise_weight_grad(
                self.x, self.grad, kernel_size=self.weight.shape[2], **sizes
            )
        return calls


def is_right(calls: dict[str, Callable[[], Tensor]]) -> bool:
    if "ours" not in calls:
        return True
    ours, theirs = calls["ours"]().float(), calls["torch"]().float()
    # PyTorch's own sums of bfloat16 are the coarser ones.
    tolerance = 1e-3 if calls["ours"]().dtype == torch.float32 else 3e-2
    return (ours - theirs).norm().item() <= tolerance * theirs.norm().item()


def bench(case: tuple[int, ...], op: str, dtype: str, layout: str, run) -> list[Row]:
    convolution = Convolution.make(case, dtype, layout)
    calls = convolution.calls(op)
    common = run.machine | {
        "op": f"depthwise_{op}",
        "mode": f"kernel {case[2]}, stride {case[3]}",
        "dtype": dtype,
        "shape": f"{BATCH}x{case[0]}x{case[1]}x{case[1]}",
        "layout": layout,
        "threads": str(torch.get_num_threads()),
    }
    if not is_right(calls):
        return [common | {"provider": "ours", "note": "WRONG"}]
    x, size = convolution.x, convolution.x.nbytes + convolution.grad.nbytes
    buffer = torch.empty_like(x)
    times = harness.measure_interleaved(
        {**calls, "copy": lambda: buffer.copy_(x)}, run.clock, seconds=run.seconds, rounds=(5, 99)
    )
    copied = 2 * x.nbytes / times.pop("copy").p50
    rows = []
    for provider, timing in times.items():
        rate = size / timing.p50
        quantiles = {f"ms_p{q}": f"{getattr(timing, f'p{q}'):.4f}" for q in (20, 50, 80)}
        speed = {"gbps": f"{rate / 1e6:.3g}", "share_of_copy": f"{rate / copied:.3g}"}
        rows.append(common | {"provider": provider} | quantiles | speed)
    return rows


def print_line(rows: list[Row]) -> None:
    first = rows[0]
    names = " ".join(first[name] for name in ("op", "shape", "mode", "dtype", "layout"))
    if first.get("note"):
        return print(names, first["note"])
    floors = [
        f"{1 / float(row['share_of_copy']):.1f} x the floor ({row['provider']})" for row in rows
    ]
    print(f"{names}: {', '.join(floors)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_depthwise", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    run.machine, run.clock = harness.describe_machine("cpu"), harness.clock_for("cpu")
    path = harness.result_path(run.output, run.machine)
    is_wrong = False
    for case, op, dtype, layout in itertools.product(CASES, OPS, DTYPES, LAYOUTS):
        rows = bench(case, op, dtype, layout, run)
        harness.record(path, rows)
        print_line(rows)
        is_wrong |= any(row.get("note") for row in rows)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
