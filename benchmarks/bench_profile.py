"""Where the time of a training step goes: by kind of operator, and outside of them.

Times every operator of a forward and backward by itself, and the same step unwatched, in turns:
what is left of that is Python and autograd's engine. On a CPU in processor time of one thread. On a
GPU operators run one at a time behind a spin: what is left (or missing) is the host.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .lib import networks, record, tables
from .lib.operators import launches
from .lib.record import DTYPES, Row
from .lib.step import Step, step_of

PROVIDERS = ("reversible", "stored")
OUTSIDE = "Python and engine"
SPIN_CYCLES = (
    500_000  # of a GPU, about 0.3 ms: longer than an op's Python, so that it does not show
)
OURS = {  # by the starts of names
    "depthwise": "convolution, depthwise",
    "pointwise": "convolution, 1×1",
    "batch_norm_factors": "batch norm, activation, gate",  # fused
    "batch_statistics": "batch norm, activation, gate",  # fused
    "norm_act": "batch norm, activation, gate",
    "norm_factors": "batch norm, activation, gate",
    "squeeze_excite": "squeeze-excite, classifier",
    "resample": "resample",
}
ACTIVATIONS = ("hardswish", "silu", "relu", "threshold", "sigmoid", "hardsigmoid", "gelu")


class OperatorTimes(TorchDispatchMode):
    """Times each operator; `kinds` has the milliseconds of each call, by kind of operator.

    On a CPU in processor time of the calling thread, so let PyTorch have one thread.
    """

    def __init__(self, batch: int, device: str) -> None:
        super().__init__()
        self.batch, self.device = batch, device
        self.kinds: dict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        result, ms = timed(lambda: func(*args, **kwargs), self.device)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        kind = kind_of(func._overloadpacket.__name__, args, tensors, self.batch)
        self.kinds[kind].append(ms)
        return result


def timed(call: Callable[[], object], device: str) -> tuple[object, float]:
    """What a call returns, and its milliseconds."""
    if device == "cpu":
        start = time.thread_time()  # other jobs on this machine do not count
        result = call()
        return result, (time.thread_time() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)  # the host gets ahead
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def kind_of(name: str, args: tuple, tensors: list[Tensor], batch: int) -> str:
    """The row of the profile that an operator belongs to."""
    for start, kind in OURS.items():
        if name.startswith(start):
            return kind
    if _is_gate(tensors, batch):
        return "squeeze-excite, classifier"
    if "convolution" in name:
        weight = args[2] if "backward" in name else args[1]
        if weight.shape[1] == 1:
            return "convolution, depthwise"
        is_pointwise = weight.shape[2:] == (1, 1)
        return "convolution, 1×1" if is_pointwise else "convolution, dense"
    if "batch_norm" in name:
        return "batch norm"
    if any(activation in name for activation in ACTIVATIONS):
        return "activation"
    if "upsample" in name:
        return "resample"
    return "additions, copies, other"


def _is_gate(tensors: list[Tensor], batch: int) -> bool:
    """Whether an operator computes, applies or differentiates one number per sample and channel."""
    return any(
        (t.dim() == 4 and t.shape[0] == batch and t.shape[2:] == (1, 1))
        or (t.dim() == 2 and t.shape[0] == batch)
        for t in tensors
    )


class Profile:
    """Times of one provider's step, watched and unwatched in turns."""

    def __init__(self, step: Step, run: argparse.Namespace) -> None:
        self.call = lambda: step.forward().backward()  # no update
        self.run = run
        self.watched: list[OperatorTimes] = []
        self.whole_ms: list[float] = []
        step()  # gradients come into being
        self.call()

    def sample(self) -> None:
        self.whole_ms.append(timed(self.call, self.run.device)[1])
        with OperatorTimes(self.run.batch, self.run.device) as times:
            self.call()
        self.watched.append(times)

    def rows(self) -> list[Row]:
        """All of the step, each kind of operator, and the rest."""
        whole = statistics.median(self.whole_ms)
        samples = [times.kinds for times in self.watched]
        kinds = {
            name: (statistics.median(sum(s[name]) for s in samples), len(samples[0][name]))
            for name in sorted(samples[0])
        }
        rest = whole - sum(ms for ms, _ in kinds.values())
        parts = {"all": (whole, launches(self.call, self.run.device)), **kinds, OUTSIDE: (rest, 0)}
        return [
            {"mode": name, "ms_p50": f"{ms:.3f}", "operators": str(calls)}
            for name, (ms, calls) in parts.items()
        ]


def bench(name: str, run: argparse.Namespace) -> list[Row]:
    profiles = {}
    for provider, net in networks.providers_of(name, PROVIDERS, run.official).items():
        torch.manual_seed(0)
        image = torch.randn(run.batch, 3, run.side, run.side)
        profiles[provider] = Profile(step_of(net, image, run), run)
    for _ in range(1 if run.quick else run.repeats):
        for profile in profiles.values():
            profile.sample()
    shape, dtype = (run.batch, 3, run.side, run.side), record.dtype_name(run.dtype)
    return [
        record.row_of(name, provider, "", dtype, shape, run.layout) | row
        for provider, profile in profiles.items()
        for row in profile.rows()
    ]


def main(arguments: list[str]) -> int:
    parser = record.parser("bench_profile", __doc__)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the authors' checkout")
    parser.add_argument("--models", nargs="+", choices=networks.NETWORKS, default=["revbifpn_s0"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES)
    record.add_layout(parser)
    parser.add_argument("--repeats", type=int, default=5)
    run = record.parse(parser, arguments)
    run.dtype = run.dtype or ("bf16" if run.device == "cuda" else "fp32")
    torch.set_num_threads(1)  # whose processor time is all that is spent
    rows = record.recorder(run, "profile")
    for name in run.models:
        rows.add(bench(name, run))
    return rows.finish(tables.profile_table(rows.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
