"""Op calls that together launch every kernel of RevBiFPN's training steps, kept in calls.json.gz.

PYTHONPATH=.:tests python tests/ptx/calls.py find    # anew, after a change of launch plans
PYTHONPATH=.:tests python tests/ptx/calls.py check   # all of them; the tests run a part
"""

import dataclasses
import gzip
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from helpers import assert_as_accurate
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from tqdm import tqdm

from benchmarks.lib.launches import calls_of_step
from benchmarks.lib.networks import LATTICE
from benchmarks.lib.ptx import emulated_gpu
from revbifpn_kernels import SIZES
from revbifpn_kernels.warmup import OpCall, Spec, kernel_key

FILE = Path(__file__).with_name("calls.json.gz")
# Stands for the batch while a step is recorded: no other side has it.
MARK = 37
BATCHES = (1, 8, 64)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int64)}
FUSIONS = "resample_add", "resample_add_", "resample_add_out", "resample_undo"
MODES = {"reversible": {}, "stored": {"reversible": False}, "exact": {"is_exact": True}}


CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
# Ops whose blocks write results of their own, so that some of them are a test of these.
SEPARATE = ("resample_add", "resample_add_out", "resample_undo", "resample_adjoint", "norm_act")
MOST_BLOCKS = 48


def at_batch(call: OpCall, batch: int) -> OpCall:
    """The call with `batch` images instead of MARK."""

    def resized(spec: Spec) -> Spec:
        if MARK not in spec.shape:
            return spec
        shape = tuple(batch if side == MARK else side for side in spec.shape)
        stride = spec.strides[spec.shape.index(MARK)]
        if stride == 0:  # a row that all images share
            return dataclasses.replace(spec, shape=shape)
        return dataclasses.replace(
            spec, shape=shape, elements=spec.elements // MARK * batch + stride
        )

    return OpCall(call.op, tree_map_only(Spec, resized, call.arguments))


def in_exact_mode(call: OpCall) -> OpCall:
    """Fusions end with the lattice, or None; other calls are the same in exact mode."""
    is_fusion = call.op in FUSIONS and call.arguments[-1] is None
    return OpCall(call.op, (*call.arguments[:-1], LATTICE)) if is_fusion else call


def elements(call: OpCall) -> int:
    """Of the largest tensor."""
    return max(leaf.elements for leaf in tree_leaves(call.arguments) if isinstance(leaf, Spec))


def kernels(call: OpCall) -> frozenset:
    return frozenset(kernel_key(*planned) for planned in call.launches())


def recorded(step: tuple) -> list[OpCall]:
    """The distinct calls of one step, of MARK images."""
    name, autocast, layout, mode = step
    side = SIZES[name].resolution
    calls = calls_of_step(name, MARK, side, autocast, layout, **MODES[mode])
    specs = [leaf for leaf in tree_leaves([*calls]) if isinstance(leaf, Spec)]
    assert not any(MARK in spec.shape[1:] for spec in specs), "a side is MARK, too"
    return list({str(call): call for call in calls}.values())


def found(calls: list[OpCall]) -> list[OpCall]:
    """Of calls of one op, those that launch kernels no earlier one does, with few images."""
    seen: set = set()
    chosen = []
    for batch, call in itertools.product(BATCHES, calls):
        wanted = kernels(at_batch(call, batch))
        if not wanted <= seen:
            seen |= wanted
            fewest = next(n for n in range(1, batch + 1) if kernels(at_batch(call, n)) == wanted)
            chosen.append(at_batch(call, fewest))
    return chosen


def pairs(call: OpCall) -> set:
    """Pairs of what the call's kernels are compiled for: constants, dtypes, absent operands."""
    every = set()
    for launch, operands in call.launches():
        values = {**launch.constants, **tree_map(kind_of, operands)}
        facts = [f"{launch.kernel.__name__} {name} {value}" for name, value in values.items()]
        every |= set(itertools.combinations(sorted(facts), 2))
    return every


def kind_of(operand) -> str:
    return str(operand.dtype if isinstance(operand, torch.Tensor) else type(operand).__name__)


def covering(calls: list[OpCall]) -> list[bool]:
    """Which calls to take so that together they have all pairs."""
    left = [pairs(call) for call in calls]
    missing, taken = set().union(*left), [False] * len(calls)
    while missing:
        best = max(range(len(calls)), key=lambda k: len(left[k] & missing))
        missing -= left[best]
        taken[best] = True
    return taken


def all_steps() -> Iterator[tuple]:
    for name, layout in itertools.product(SIZES, ("nchw", "channels_last")):
        for autocast in (None, torch.bfloat16):
            for mode in ("reversible", "stored", *(["exact"] if name == "revbifpn_s0" else [])):
                yield name, autocast, layout, mode


def some_blocks(count: int) -> list[int]:
    """The first, the last and some between."""
    if count <= MOST_BLOCKS:
        return list(range(count))
    middle = random.Random(0).sample(range(1, count - 1), MOST_BLOCKS - 2)
    return [0, *sorted(middle), count - 1]


def random_tensor(spec: Spec) -> Tensor:
    """Not about 0: sums of thousands of terms that cancel out would be left to chance."""
    tensor = spec.on("cpu")
    if not spec.dtype.is_floating_point:
        return tensor.zero_()
    return fill(tensor, torch.randn(spec.shape) + 1)


def outputs(op: str, arguments: tuple, keys=None) -> list[Tensor]:
    """What a call returns, then what it wrote to; its arguments stay, and `out` holds nothing."""
    function = getattr(torch.ops.revbifpn, op).default
    given = []
    for argument, value in zip(function._schema.arguments, arguments, strict=True):
        is_out = argument.name == "out"
        given.append(Spec.of(value).on("cpu") if is_out else tree_map_only(Tensor, copied, value))
    result = function.redispatch(keys, *given) if keys else function(*given)
    written = [
        value
        for argument, value in zip(function._schema.arguments, given, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write and value is not None
    ]
    leaves = [leaf for leaf in tree_leaves((result, written)) if leaf is not None]
    return [leaf for leaf in leaves if leaf.dtype.is_floating_point]


def copied(tensor: Tensor) -> Tensor:
    return fill(Spec.of(tensor).on("cpu"), tensor)


def fill(tensor: Tensor, values: Tensor) -> Tensor:
    """Copy values into a tensor; the first row alone where all images share one."""
    if tensor.dim() > 0 and tensor.stride(0) == 0:
        tensor[:1].copy_(values[:1])
    else:
        tensor.copy_(values)
    return tensor


def with_own_gate(grad, x, mean, invstd, weight, bias, gate, means, *rest) -> tuple:
    """The arguments with the gate that the means have, which tells its slope."""
    *network, _, squeeze_act, _ = rest
    gate = torch.ops.revbifpn.squeeze_excite_gates(means, *network, squeeze_act)
    return grad, x, mean, invstd, weight, bias, gate, means, *rest


def check(call: OpCall) -> None:
    """Assert that the call computes what its C++ op does, where blocks of it ran."""
    arguments = tree_map_only(Spec, random_tensor, call.arguments)
    if call.op == "norm_act_excite_grad":
        arguments = with_own_gate(*arguments)
    with emulated_gpu(blocks=some_blocks if call.op in SEPARATE else None) as gpu:
        ours = outputs(call.op, arguments, CUDA)
        written = [gpu.written(tensor) for tensor in ours]
    is_whole = all(np.prod(launch.grid) <= MOST_BLOCKS for launch in gpu.launches)
    for mask in written:
        assert mask.all() if is_whole or call.op not in SEPARATE else mask.any()
    plain = outputs(call.op, arguments)
    ours = [torch.where(*each) for each in zip(written, ours, plain, strict=True)]
    if call.op in FUSIONS and call.arguments[-1] is not None:
        # An update in the middle between two steps of the lattice may be rounded to either.
        is_step = (ours[0] - plain[0]).abs() <= call.arguments[-1]
        ours[0] = torch.where(is_step, plain[0], ours[0])
    assert_as_accurate(ours, lambda *given: outputs(call.op, given), *arguments)


def as_json(leaf):
    if isinstance(leaf, Spec):
        return {"dtype": str(leaf.dtype), **{k: v for k, v in vars(leaf).items() if k != "dtype"}}
    return {"torch": str(leaf)} if isinstance(leaf, torch.dtype) else leaf


def from_json(values: dict):
    if "torch" in values:
        return DTYPES[values["torch"]]
    places = {name: tuple(values[name]) for name in ("shape", "strides")}
    return Spec(
        DTYPES[values["dtype"]], **places, offset=values["offset"], elements=values["elements"]
    )


def read() -> list[tuple[OpCall, bool]]:
    """The calls, and whether each is one of a set with all pairs."""
    lines = gzip.decompress(FILE.read_bytes()).decode().splitlines()
    found = (json.loads(line, object_hook=from_json) for line in lines)
    return [(OpCall(op, tuple(arguments)), is_covering) for op, arguments, is_covering in found]


def write(steps: Iterable[list[OpCall]], pool: Executor) -> None:
    """The calls of all steps, also in exact mode, that launch kernels of their own."""
    calls: dict[str, dict[str, OpCall]] = {}
    for step in steps:
        for call in itertools.chain(step, map(in_exact_mode, step)):
            calls.setdefault(call.op, {})[str(call)] = call
    per_op = list(pool.map(found, [list(each.values()) for each in calls.values()]))
    taken = pool.map(covering, per_op)
    lines = [
        json.dumps([*call, is_covering], default=as_json)
        for pair in zip(per_op, taken, strict=True)
        for call, is_covering in zip(*pair, strict=True)
    ]
    FILE.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    every = frozenset().union(*map(kernels, itertools.chain(*per_op)))
    print(f"{len(lines)} calls launch {len(every)} kernels")


def problem(call: OpCall) -> str:
    try:
        check(call)
    except Exception as error:
        return f"{call.op} {call.arguments}: {error!r}"
    return ""


def main() -> int:
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        if sys.argv[1] == "find":
            steps = list(all_steps())
            write(tqdm(pool.map(recorded, steps), total=len(steps), unit="step"), pool)
            return 0
        # The largest maps last, which take most of the time.
        calls = sorted((call for call, _ in read()), key=elements)
        waiting = [pool.submit(problem, call) for call in calls]
        progress, problems = tqdm(as_completed(waiting), total=len(calls), unit="call"), 0
        for done in progress:
            if done.result():
                progress.write(done.result())
                problems += 1
    print(f"{len(calls)} calls, {problems} with a fault")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
