"""Op calls that together launch every kernel of RevBiFPN's training steps, kept in calls.json.

PYTHONPATH=. python tests/ptx/calls.py     # finds them anew, after a change of launch plans
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from benchmarks.lib.launches import Call, Spec, calls_of_step, kernel_key
from benchmarks.lib.networks import LATTICE
from revbifpn_kernels import SIZES

FILE = Path(__file__).with_name("calls.json")
# Stands for the batch while a step is recorded: no other side has it.
MARK = 13
BATCHES = (1, 8, 64)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int64)}
FUSIONS = "resample_add", "resample_add_", "resample_add_out", "resample_undo"
MODES = {"reversible": {}, "stored": {"reversible": False}, "exact": {"is_exact": True}}


def at_batch(call: Call, batch: int) -> Call:
    """The call with `batch` images instead of MARK."""

    def resized(spec: Spec) -> Spec:
        if MARK not in spec.shape:
            return spec
        shape = tuple(batch if side == MARK else side for side in spec.shape)
        stride = spec.strides[spec.shape.index(MARK)]
        return dataclasses.replace(
            spec, shape=shape, elements=spec.elements // MARK * batch + stride
        )

    return Call(call.op, tree_map_only(Spec, resized, call.arguments))


def in_exact_mode(call: Call) -> Call:
    """Fusions end with the lattice, or None; other calls are the same in exact mode."""
    is_fusion = call.op in FUSIONS and call.arguments[-1] is None
    return Call(call.op, (*call.arguments[:-1], LATTICE)) if is_fusion else call


def kernels(call: Call) -> frozenset:
    return frozenset(kernel_key(*planned) for planned in call.launches())


def recorded(step: tuple) -> list[Call]:
    """The distinct calls of one step, of MARK images."""
    name, autocast, layout, mode = step
    side = SIZES[name].resolution
    calls = calls_of_step(name, MARK, side, autocast, layout, **MODES[mode])
    return list({str(call): call for call in calls}.values())


def found(calls: list[Call]) -> list[tuple[frozenset, Call]]:
    """Of calls of one op, those that launch kernels no earlier one does, with few images."""
    seen: set = set()
    chosen = []
    for batch, call in itertools.product(BATCHES, calls):
        wanted = kernels(at_batch(call, batch))
        if not wanted <= seen:
            seen |= wanted
            fewest = next(n for n in range(1, batch + 1) if kernels(at_batch(call, n)) == wanted)
            chosen.append((wanted, at_batch(call, fewest)))
    return chosen


def all_steps() -> Iterator[tuple]:
    for name, layout in itertools.product(SIZES, ("nchw", "channels_last")):
        for autocast in (None, torch.bfloat16):
            for mode in ("reversible", "stored", *(["exact"] if name == "revbifpn_s0" else [])):
                yield name, autocast, layout, mode


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


def read() -> list[Call]:
    lines = FILE.read_text().splitlines()
    return [Call(*json.loads(line, object_hook=from_json)) for line in lines]


def main() -> None:
    calls: dict[str, dict[str, Call]] = {}
    with ProcessPoolExecutor() as pool:
        steps = list(all_steps())
        for each in tqdm(pool.map(recorded, steps), total=len(steps), unit="step"):
            for call in itertools.chain(each, map(in_exact_mode, each)):
                calls.setdefault(call.op, {})[str(call)] = call
        per_op = [list(each.values()) for each in calls.values()]
        chosen = list(tqdm(pool.map(found, per_op), total=len(per_op), unit="op"))
    lines = [json.dumps(call, default=as_json) for _, call in itertools.chain(*chosen)]
    FILE.write_text("\n".join(lines) + "\n")
    every = frozenset().union(*(keys for keys, _ in itertools.chain(*chosen)))
    print(f"{len(lines)} calls launch {len(every)} kernels")


if __name__ == "__main__":
    main()
