"""Times what follows a convolution in MBConv: batch norm, Hardswish and, gated, squeeze-excite.

Ours (ops/norm_act.py, ops/squeeze_excite.py) beside PyTorch eager and torch.compile, whose kernels
the compiler fuses. Gradients are compared with float64 first. Times are interleaved medians; GB/s
count the maps that must be read and written. `python -m benchmarks.bench_norms`.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import revbifpn_kernels  # noqa: F401  (registers the ops)

from .lib import harness
from .lib.harness import Row
from .lib.workloads import LAYOUTS

RESULTS = Path(__file__).parent / "results"
EPS, MOMENTUM, HIDDEN = 1e-3, 0.1, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# N, C, H, W: expanded maps of S0's and S6's level 0.
SHAPES = {
    "cpu": [(4, 96, 56, 56), (4, 640, 88, 88)],
    "cuda": [(256, 96, 56, 56), (32, 640, 88, 88)],
}
_ops = torch.ops.revbifpn


@dataclass
class Stage:
    """The maps that a convolution left, and the parameters of what follows; gated or not."""

    u: Tensor
    grad: Tensor
    norm: list[Tensor]  # weight, bias
    network: list[Tensor]  # of squeeze-excite

    @classmethod
    def make(cls, shape, dtype: torch.dtype, layout: str, gated: bool, device: str) -> "Stage":
        generator = torch.Generator().manual_seed(0)

        def random(*sides: int) -> Tensor:
            return torch.randn(sides, generator=generator).to(device)

        def maps() -> Tensor:
            return random(*shape).to(dtype, memory_format=LAYOUTS[layout])

        channels = shape[1]
        network = [random(HIDDEN, channels, 1, 1), random(HIDDEN)]
        network += [random(channels, HIDDEN, 1, 1), random(channels)]
        network = [values * 0.1 for values in network] if gated else []
        return cls(maps(), maps(), [random(channels) + 1, random(channels)], network)

    def to(self, dtype: torch.dtype) -> "Stage":
        lists = ([t.to(dtype) for t in values] for values in (self.norm, self.network))
        return Stage(self.u.to(dtype), self.grad.to(dtype), *lists)

    @property
    def leaves(self) -> list[Tensor]:
        return [t.detach().requires_grad_() for t in (self.u, *self.norm, *self.network)]


def modules(u: Tensor, weight: Tensor, bias: Tensor, *network: Tensor) -> Tensor:
    """What the modules compute one by one."""
    y = F.hardswish(F.batch_norm(u, None, None, weight, bias, True, MOMENTUM, EPS))
    if not network:
        return y
    reduce, reduce_bias, expand, expand_bias = (t.to(y.dtype) for t in network)
    hidden = F.hardswish(F.linear(y.mean((2, 3)), reduce.flatten(1), reduce_bias))
    gates = F.hardsigmoid(F.linear(hidden, expand.flatten(1), expand_bias))
    return y * gates[:, :, None, None]


def ours_forward(stage: Stage) -> tuple:
    """y, and what the gradient needs."""
    statistics = _ops.batch_statistics(stage.u, EPS, None, None, None, MOMENTUM)
    norm, gates, means = (*statistics, *stage.norm), None, None
    if stage.network:
        means = _ops.norm_act_means(stage.u, *norm, "hardswish")
        gates = _ops.squeeze_excite_gates(means, *stage.network, "hardswish")
    return _ops.norm_act(stage.u, *norm, gates, "hardswish"), norm, gates, means


def ours_backward(stage: Stage, kept: tuple) -> tuple[Tensor, ...]:
    _, norm, gates, means = kept
    given = stage.grad, stage.u, *norm, gates
    if not stage.network:
        return _ops.norm_act_grad(*given, None, None, "hardswish", True)
    acts = "hardswish", "hardswish"
    return _ops.norm_act_excite_grad(*given, means, *stage.network, *acts, True)


def gradients(function: Callable, stage: Stage) -> tuple[Tensor, ...]:
    leaves = stage.leaves
    return torch.autograd.grad(function(*leaves), leaves, stage.grad)


def calls_of(stage: Stage, with_compiler: bool) -> dict[tuple[str, str], Callable]:
    """By provider and mode."""
    kept, leaves, buffer = ours_forward(stage), stage.leaves, torch.empty_like(stage.grad)
    graph = modules(*leaves)
    calls = {
        ("ours", "fwd"): lambda: ours_forward(stage),
        ("ours", "bwd"): lambda: ours_backward(stage, kept),
        ("ours", "fwd+bwd"): lambda: ours_backward(stage, ours_forward(stage)),
        ("torch", "fwd"): lambda: modules(*leaves).detach(),
        ("torch", "bwd"): lambda: torch.autograd.grad(graph, leaves, stage.grad, retain_graph=True),
        ("torch", "fwd+bwd"): lambda: gradients(modules, stage),
        ("copy", "copy"): lambda: buffer.copy_(stage.grad),
    }
    if with_compiler:
        torch._dynamo.reset()
        compiled = torch.compile(modules, fullgraph=True, dynamic=False)
        gradients(compiled, stage)  # compiles both
        calls["compile", "fwd+bwd"] = lambda: gradients(compiled, stage)
    return calls


def fault_of(stage: Stage) -> str:
    """What is wrong with our gradients, or "": twice eager's error, plus one eps, is allowed."""
    exact = gradients(modules, stage.to(torch.float64))
    eager, ours = gradients(modules, stage), ours_backward(stage, ours_forward(stage))
    for k, (truth, usual, result) in enumerate(zip(exact, eager, ours, strict=True)):
        scale = truth.norm()
        eps = torch.finfo(result.dtype).eps
        allowed = 2 * ((usual.double() - truth).norm() / scale).item() + eps
        error = ((result.double() - truth).norm() / scale).item()
        if not error <= allowed:
            return f"gradient {k} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def bytes_moved(stage: Stage, mode: str) -> int:
    """Statistics, means and y; sums and dx: passes over the maps."""
    passes = {"fwd": 4 if stage.network else 3, "bwd": 5, "copy": 2}
    passes["fwd+bwd"] = passes["fwd"] + passes["bwd"]
    return passes[mode] * stage.u.nbytes


def bench(shape, dtype: str, layout: str, gated: bool, run: argparse.Namespace) -> list[Row]:
    stage = Stage.make(shape, DTYPES[dtype], layout, gated, run.device)
    common = run.machine | {
        "op": "norm, act, squeeze-excite" if gated else "norm, act",
        "dtype": dtype,
        "shape": "x".join(map(str, shape)),
        "layout": layout,
        "threads": str(torch.get_num_threads()),
    }
    if fault := fault_of(stage):
        return [common | {"provider": "ours", "mode": "fwd+bwd", "note": f"WRONG: {fault}"}]
    times = harness.measure_interleaved(
        calls_of(stage, run.compile), run.clock, seconds=run.seconds, rounds=(5, 60)
    )
    copy = times.pop(("copy", "copy"))
    copied = bytes_moved(stage, "copy") / copy.p50
    rows = []
    for (provider, mode), timing in times.items():
        rate = bytes_moved(stage, mode) / timing.p50
        quantiles = {f"ms_p{q}": f"{getattr(timing, f'p{q}'):.4f}" for q in (20, 50, 80)}
        speed = {"gbps": f"{rate / 1e6:.2f}", "share_of_copy": f"{rate / copied:.3g}"}
        rows.append(common | {"provider": provider, "mode": mode} | quantiles | speed)
    return rows


def print_ratios(rows: list[Row]) -> None:
    ms = {
        (row["provider"], row["mode"]): float(row["ms_p50"]) for row in rows if not row.get("note")
    }
    names = " ".join(rows[0][name] for name in ("op", "dtype", "shape", "layout"))
    ratios = [
        f"{mode} {ms[key] / ms['ours', mode]:.2f} x {provider}"
        for key in ms
        for provider, mode in [key]
        if provider != "ours"
    ]
    print(f"{names}: {', '.join(ratios) or rows[0]['note']}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_norms", description=__doc__)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each stage")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR|CSV")
    run = parser.parse_args(arguments)
    run.machine, run.clock = harness.describe_machine(run.device), harness.clock_for(run.device)
    path, is_wrong = harness.result_path(run.output, run.machine), False
    for shape in SHAPES[run.device]:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for gated in (True, False):
                    rows = bench(shape, dtype, layout, gated, run)
                    harness.record(path, rows)
                    print_ratios(rows)
                    is_wrong |= any(row.get("note") for row in rows)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
