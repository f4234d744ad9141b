"""Times MBConv, whole and in parts, beside PyTorch; the stages also beside torch.compile.

stages: what follows a convolution, which is batch norm, Hardswish and, gated, squeeze-excite
(ops/norm_act, ops/squeeze_excite). convolutions: on CPUs, our ops (ops/conv) at convolutions of
RevBiFPN-S0. blocks: forward and backward of every MBConv of RevBiFPN-S0 to S6, fused beside its
modules one by one. Results are compared first. Times on a GPU are of the device alone
(lib/clocks.py). GB/s count the maps that must move.
"""

import argparse
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revbifpn_kernels import MBConv, create_model
from revbifpn_kernels.mbconv import BatchNorm2d
from revbifpn_kernels.ops.conv.depthwise import depthwise_input_grad, depthwise_weight_grad
from revbifpn_kernels.ops.conv.pointwise_conv import pointwise_conv, pointwise_conv_backward

from .lib import clocks, record, tables, timing
from .lib.first_calls import FirstCalls, compilers_of
from .lib.record import Row
from .lib.workloads import LAYOUTS

EPS, MOMENTUM, HIDDEN = 1e-3, 0.1, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# N, C, H, W: expanded maps of S0's and S6's level 0.
SHAPES = {
    "cpu": [(4, 96, 56, 56), (4, 640, 88, 88)],
    "cuda": [(256, 96, 56, 56), (32, 640, 88, 88)],
}
DEPTHWISE = (  # channels, side, kernel, stride
    (24, 56, 3, 1),
    (48, 56, 3, 2),
    (48, 56, 5, 1),
    (48, 56, 7, 4),
    (48, 56, 15, 8),
    (32, 28, 5, 1),
    (80, 14, 5, 1),
    (160, 7, 5, 1),
)
POINTWISE = (  # channels, side, channels of the result
    (24, 56, 24),
    (24, 56, 48),
    (48, 56, 48),
    (32, 28, 32),
    (48, 28, 64),
    (64, 28, 48),
    (128, 28, 64),
    (80, 14, 40),
    (40, 14, 80),
    (80, 14, 160),
    (160, 7, 320),
    (320, 7, 160),
)
BATCH = 4
ROUNDS = (timing.FEWEST, 60)
NETWORKS = {f"revbifpn_s{scale}": 4 if scale < 3 else 1 for scale in range(7)}  # with their batches
_ops = torch.ops.revbifpn
Calls = dict[str, Callable[[], object]]  # by provider


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

    @property
    def bytes_moved(self) -> int:
        """Statistics, gated means, and y; sums and dx: passes over the maps."""
        return self.u.nbytes * (9 if self.network else 8)


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
        acts = "hardswish", "hardswish"
        gates, means = _ops.norm_act_gates(stage.u, *norm, *stage.network, *acts)
    return _ops.norm_act(stage.u, *norm, gates, "hardswish"), norm, gates, means


def ours_backward(stage: Stage, saved: tuple) -> tuple[Tensor, ...]:
    _, norm, gates, means = saved
    given = stage.grad, stage.u, *norm, gates
    if not stage.network:
        return _ops.norm_act_grad(*given, None, None, "hardswish", True)
    acts = "hardswish", "hardswish"
    return _ops.norm_act_excite_grad(*given, means, *stage.network, *acts, True)


def gradients(function: Callable, stage: Stage) -> tuple[Tensor, ...]:
    leaves = stage.leaves
    return torch.autograd.grad(function(*leaves), leaves, stage.grad)


def stage_calls(stage: Stage, modes: dict[str, str]) -> Calls:
    """Forward and backward, by provider; `modes` are those of the compiler."""
    calls = {
        "ours": lambda: ours_backward(stage, ours_forward(stage)),
        "torch": lambda: gradients(modules, stage),
    }
    if modes:
        torch._dynamo.reset()
    for name, mode in modes.items():
        compiled = torch.compile(modules, fullgraph=True, dynamic=False, mode=mode)
        calls[name] = functools.partial(gradients, compiled, stage)
    return calls


def compared(exact, eager, results, slack: float) -> tuple[str, float]:
    """What is wrong, or "", and the largest relative error against float64.

    Allowed is `slack` times this: twice eager's error, plus one eps.
    """
    largest = 0.0
    for k, (truth, usual, result) in enumerate(zip(exact, eager, results, strict=True)):
        scale = truth.norm()
        eps = torch.finfo(result.dtype).eps
        allowed = slack * (2 * ((usual.double() - truth).norm() / scale).item() + eps)
        error = ((result.double() - truth).norm() / scale).item()
        if not error <= allowed:
            return f"gradient {k} is off by {error:.1e}, allowed {allowed:.1e}", error
        largest = max(largest, error)
    return "", largest


def channels_last_maps(channels: int, side: int, dtype: torch.dtype) -> Tensor:
    maps = torch.randn(BATCH, channels, side, side, dtype=dtype)
    return maps.to(memory_format=torch.channels_last)


def torch_gradients(grad: Tensor, x: Tensor, weight: Tensor, stride=1, padding=0, *, wanted):
    """PyTorch's gradients of x and weight, those that are `wanted`, by one call."""
    groups = x.shape[1] // weight.shape[1]
    rest = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [*wanted, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *rest)[:2]


def depthwise_calls(
    case: tuple[int, ...], dtype: torch.dtype, is_input: bool
) -> tuple[Tensor, int, Calls]:
    """Maps in channels_last, the bytes to move, and who takes the gradient of maps or weights."""
    channels, side, kernel, stride = case
    sizes = {"stride": stride, "padding": kernel // 2}
    x = channels_last_maps(channels, side, dtype)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype)
    grad = torch.randn_like(F.conv2d(x, weight, None, **sizes, groups=channels))

    def ours() -> Tensor:
        if is_input:
            return depthwise_input_grad(grad, weight, x.shape[2:], **sizes)
        return depthwise_weight_grad(x, grad, kernel_size=kernel, **sizes)

    def theirs() -> Tensor:
        grads = torch_gradients(grad, x, weight, **sizes, wanted=(is_input, not is_input))
        return grads[0 if is_input else 1]

    return x, x.nbytes + grad.nbytes, {"ours": ours, "torch": theirs}


def pointwise_calls(
    case: tuple[int, ...], dtype: torch.dtype, is_backward: bool
) -> tuple[Tensor, int, Calls]:
    """The same for a 1×1 convolution, or for both of its gradients."""
    channels, side, results = case
    x = channels_last_maps(channels, side, dtype)
    weight = torch.randn(results, channels, 1, 1, dtype=dtype)
    grad = torch.randn_like(F.conv2d(x, weight))
    if not is_backward:
        calls = {"ours": lambda: pointwise_conv(x, weight), "torch": lambda: F.conv2d(x, weight)}
        return x, x.nbytes + grad.nbytes, calls
    calls = {
        "ours": lambda: pointwise_conv_backward(grad, x, weight),
        "torch": lambda: torch_gradients(grad, x, weight, wanted=(True, True)),
    }
    return x, 2 * (x.nbytes + grad.nbytes), calls


def fault_of(calls: Calls) -> str:
    """What is wrong with our results beside PyTorch's, or ""."""
    pairs = zip(tree_leaves(calls["ours"]()), tree_leaves(calls["torch"]()), strict=True)
    for k, (ours, theirs) in enumerate(pairs):
        # PyTorch's own sums of bfloat16 are the coarser ones. In float32 errors are about 3e-7, but
        # where rounding takes one value across a kink of hardswish, its slope differs: 1.5e-3 then.
        allowed = 1e-2 if ours.dtype == torch.float32 else 3e-2
        error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
        if not error <= allowed:
            return f"result {k} is off by {error:.1e}, allowed {allowed:.0e}"
    return ""


def blocks_of(name: str) -> Iterator[tuple[MBConv, tuple[int, ...], str]]:
    """The distinct MBConvs of a network, the shape of the maps each gets, a description."""
    network = create_model(name, drop_rate=0.0, drop_path_rate=0.0).eval()
    found: dict[str, tuple[MBConv, tuple[int, ...], str]] = {}

    def note(block: MBConv, inputs: tuple[Tensor]) -> None:
        depthwise, project = block.depthwise.conv, block.project.conv
        kernel, stride = depthwise.kernel_size[0], depthwise.stride[0]
        widths = f"{inputs[0].shape[1]}-{depthwise.out_channels}-{project.out_channels}"
        gate = ", gated" if hasattr(block, "squeeze_excite") else ""
        text = f"{kernel}x{kernel}, stride {stride}, {widths}{gate}"
        shape = (NETWORKS[name], *inputs[0].shape[1:])
        found[f"{text} {shape}"] = block, shape, text

    for block in network.modules():
        if isinstance(block, MBConv):
            block.register_forward_pre_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, *[network.config.resolution] * 2))
    for block, shape, text in found.values():
        block._forward_pre_hooks.clear()
        for norm in filter(lambda module: isinstance(module, BatchNorm2d), block.modules()):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # where it is 0 all gradients would be
        yield block.train(), shape, text


def block_calls(block: MBConv, x: Tensor) -> Calls:
    """Forward and all gradients of a block, fused and by its modules."""
    modules = copy.deepcopy(block)
    modules.project.register_forward_hook(lambda *_: None)  # which the fused path would not call
    y = modules(x)
    grad = torch.randn(y.shape).to(y)  # drawn on the CPU: a failed capture spoils the GPU's draws

    def step(block: MBConv) -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x), [x, *block.parameters()], grad)

    return {"ours": lambda: step(block), "torch": lambda: step(modules)}


def timed(
    row: Row, calls: Calls, maps: Tensor, bytes_moved: int, run, first: FirstCalls
) -> list[Row]:
    """A row per provider; its speed beside that of a copy of the maps in the same turns."""
    if not calls:
        return []
    buffer = torch.empty_like(maps)
    calls = calls | {"copy": lambda: buffer.copy_(maps)}
    times = timing.measure_interleaved(calls, run.clock, seconds=run.seconds, rounds=ROUNDS)
    copied = 2 * maps.nbytes / times.pop("copy").p50
    rows = []
    for provider, found in times.items():
        rate = bytes_moved / found.p50
        speed = {"gbps": f"{rate / 1e6:.4g}", "share_of_copy": f"{rate / copied:.3g}"}
        if run.clock.peak_gbps:
            speed["share_of_peak"] = f"{rate / 1e6 / run.clock.peak_gbps:.3g}"
        columns = found.columns(first.seconds.get(provider)) | first.columns(provider)
        rows.append(row | {"provider": provider} | columns | speed)
    return rows


def stages(run: argparse.Namespace) -> Iterator[list[Row]]:
    shapes = SHAPES[run.device][: 1 if run.quick else None]
    for shape, dtype, layout, gated in itertools.product(shapes, DTYPES, LAYOUTS, (True, False)):
        stage = Stage.make(shape, DTYPES[dtype], layout, gated, run.device)
        op = "norm_act, squeeze_excite" if gated else "norm_act"
        row = record.row_of(op, "ours", "fwd+bwd", dtype, shape, layout)
        yield stage_rows(row, stage, run)


def stage_rows(row: Row, stage: Stage, run: argparse.Namespace) -> list[Row]:
    """Of ours, unless it is wrong, and of the rivals that are not."""
    modes = compilers_of(run.device) if run.compile else {}
    calls, first = stage_calls(stage, modes), FirstCalls(run.clock, run.device)
    expected = gradients(modules, stage.to(torch.float64)), gradients(modules, stage)
    for name in ("ours", *modes):
        first.run(name, calls[name], functools.partial(compared, *expected))
        if "ours" in first.notes:
            calls.clear()
            break
    del expected
    calls = {name: call for name, call in calls.items() if name not in first.notes}
    rows = [row | {"provider": name, "note": note} for name, note in first.notes.items()]
    return rows + timed(row, calls, stage.u, stage.bytes_moved, run, first)


def convolutions(run: argparse.Namespace) -> Iterator[list[Row]]:
    if run.device == "cuda":
        return
    kinds = (
        (depthwise_calls, DEPTHWISE, "{2}x{2}, stride {3}",
         "depthwise_weight_grad", "depthwise_input_grad"),
        (pointwise_calls, POINTWISE, "1x1, to {2}", "pointwise_conv", "pointwise_conv_backward"),
    )  # fmt: skip
    for (calls_of, cases, text, *ops), dtype in itertools.product(kinds, DTYPES):
        for case, second in itertools.product(cases[: 1 if run.quick else None], (False, True)):
            x, bytes_moved, calls = calls_of(case, DTYPES[dtype], second)
            mode = "fwd" if ops[second] == "pointwise_conv" else "bwd"
            row = record.row_of(ops[second], "ours", mode, dtype, x.shape, "channels_last")
            row["kernel"] = text.format(*case)
            if fault := fault_of(calls):
                yield [row | {"note": f"WRONG: {fault}"}]
            else:
                yield timed(row, calls, x, bytes_moved, run, FirstCalls(run.clock, run.device))


def blocks(run: argparse.Namespace) -> Iterator[list[Row]]:
    seen = set()
    for name in list(NETWORKS)[: 1 if run.quick else None]:
        for block, shape, text in blocks_of(name):
            if (shape, text) in seen:
                continue
            seen.add((shape, text))
            for layout, memory_format in LAYOUTS.items():
                block = block.to(run.device, memory_format=memory_format)
                x = torch.randn(shape).to(run.device, memory_format=memory_format)
                calls = block_calls(block, x.requires_grad_())
                row = record.row_of("MBConv", "ours", "fwd+bwd", "fp32", shape, layout)
                row |= {"kernel": text, "network": name}
                first_s = run.clock.wall_s(calls["ours"])
                if fault := fault_of(calls):
                    yield [row | {"note": f"WRONG: {fault}"}]
                else:
                    times = timing.measure_interleaved(
                        calls, run.clock, seconds=run.seconds, rounds=ROUNDS
                    )
                    firsts = {"ours": first_s} if run.device == "cuda" else {}
                    yield [row | {"provider": p} | found.columns(firsts.get(p))
                           for p, found in times.items()]  # fmt: skip


# With the share of the seconds that each case gets.
PARTS = {"stages": (stages, 1), "convolutions": (convolutions, 0.2), "blocks": (blocks, 0.4)}


def main(arguments: list[str]) -> int:
    parser = record.parser("bench_mbconv", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1.5, help="per stage")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    run = record.parse(parser, arguments)
    run.clock = clocks.clock_for(run.device)
    rows = record.recorder(run, "mbconv")
    for part in run.parts:
        cases, share = PARTS[part]
        for new in cases(argparse.Namespace(**{**vars(run), "seconds": run.seconds * share})):
            rows.add(new)
    writers = tables.norms_table, tables.convolutions_table, tables.blocks_table
    return rows.finish("\n".join(filter(None, (write(rows.rows) for write in writers))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
