"""Instructions that touch memory: loads, stores, atomics, matrices of halves, copies."""

import re

import numpy as np

from .arithmetic import U, u32, u64
from .memory import Fault
from .program import Instruction, bits_of
from .traffic import WARP


def _check_aligned(address: np.ndarray, width: int) -> None:
    wrong = address[address % width != 0]
    if len(wrong):
        raise Fault(f"misaligned: {width}-byte access at {wrong[0]:#x}, {len(wrong)} lanes")


def _load(machine, space: str, address, width: int, lanes, number: int) -> np.ndarray:
    if space == "shared":
        if machine.traffic:
            machine.traffic.count_shared(address, width, lanes)
        return machine.shared.load(address, width, lanes)
    data = machine.memory.load(address, width, machine.stamps(lanes), number)
    if machine.traffic:
        blocks = machine.blocks[lanes]
        machine.traffic.count_global(number, address, width, lanes, blocks, is_store=False)
    return data


def _store(machine, space: str, address, data: np.ndarray, lanes, number: int) -> None:
    width = data.shape[1]
    if space == "shared":
        if machine.traffic:
            machine.traffic.count_shared(address, width, lanes)
        machine.shared.store(address, data, lanes)
        return
    machine.memory.store(address, data, machine.stamps(lanes))
    if machine.traffic:
        blocks = machine.blocks[lanes]
        machine.traffic.count_global(number, address, width, lanes, blocks, is_store=True)


def compile_access(machine, instruction: Instruction, number: int):
    parts = instruction.parts
    is_load = parts[0] == "ld"
    space = next((p for p in parts if p in ("global", "shared", "param")), None)
    place, value = instruction.operands if not is_load else instruction.operands[::-1][-2:]
    values = value.value if value.kind == "vector" else [value]
    size = bits_of(parts[-1]) // 8
    width, unsigned = size * len(values), U[8 * size]
    base, offset = place.value
    if space == "param":
        held = machine.arguments[int(base.value.rsplit("_", 1)[1])].view(unsigned)
        return lambda mask: machine.put(values[0], held, mask)
    if space is None or any(re.fullmatch(r"(cluster|L1::.*|volatile|atom.*)", p) for p in parts):
        raise NotImplementedError(instruction.text)
    read_base = machine.reader(base, u64 if space == "global" else u32)
    reads = [] if is_load else [machine.reader(each, unsigned) for each in values]

    def load(mask) -> None:
        lanes, address = machine.per_lane(read_base, mask)
        address = address.astype(np.int64) + offset
        _check_aligned(address, width)
        data = _load(machine, space, address, width, lanes, number).view(unsigned)
        for k, each in enumerate(values):
            column = np.zeros(machine.count, unsigned)
            column[lanes] = data[:, k]
            machine.put(each, column, mask)

    def store(mask) -> None:
        lanes, address = machine.per_lane(read_base, mask)
        address = address.astype(np.int64) + offset
        _check_aligned(address, width)
        data = np.stack([machine.per_lane(read, mask)[1] for read in reads], 1)
        _store(machine, space, address, data.view(np.uint8), lanes, number)

    return load if is_load else store


def compile_atomic(machine, instruction: Instruction):
    """atom.add, lane by lane in the order of their numbers."""
    if not re.fullmatch(r"atom\.global\.gpu\.(acq_rel|relaxed)\.add\.u32", instruction.opcode):
        raise NotImplementedError(instruction.text)
    target, place, value = instruction.operands
    read_base, read_value = machine.reader(place.value[0], u64), machine.reader(value, u32)
    is_ordering = "acq_rel" in instruction.parts

    def add(mask) -> None:
        lanes, address = machine.per_lane(read_base, mask)
        address = address.astype(np.int64) + place.value[1]
        _check_aligned(address, u32().itemsize)
        before, added = np.zeros(machine.count, u32), machine.per_lane(read_value, mask)[1]
        for at, each, lane, stamp in zip(
            address.tolist(), added, lanes, machine.stamps(lanes).tolist(), strict=True
        ):
            before[lane] = machine.memory.add_atomically(at, each, stamp, is_ordering)
        machine.put(target, before, mask)

    return add


def compile_matrix(machine, instruction: Instruction, number: int):
    """Eight lanes name the rows of a matrix of 8 × 8 halves; each lane has two halves of it."""
    if "trans" in instruction.parts:
        raise NotImplementedError(instruction.text)
    is_load = instruction.parts[0] == "ldmatrix"
    held, place = instruction.operands if is_load else instruction.operands[::-1]
    registers = held.value if held.kind == "vector" else [held]
    read_base, offset = machine.reader(place.value[0], u32), place.value[1]
    reads = [] if is_load else [machine.reader(each, u32) for each in registers]

    def move(mask) -> None:
        lanes, address = machine.per_lane(read_base, mask)
        address = address.astype(np.int64) + offset
        if len(lanes) % WARP or (lanes.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise Fault("a matrix access that not all lanes of a warp reach")
        lane = lanes % WARP
        of_matrix = np.arange(len(lanes)) // WARP, lane // 4, lane % 4
        for k, register in enumerate(registers):
            rows = np.nonzero(lane // 8 == k)[0]
            _check_aligned(address[rows], 16)
            where = address[rows], lanes[rows]
            if is_load:
                data = _load(machine, "shared", where[0], 16, where[1], number).view(u32)
                value = np.zeros(machine.count, u32)
                value[lanes] = data.reshape(-1, 8, 4)[of_matrix]
                machine.put(register, value, mask)
            else:
                data = np.empty((len(lanes) // WARP, 8, 4), u32)
                data[of_matrix] = machine.per_lane(reads[k], mask)[1]
                data = data.reshape(-1, 4).view(np.uint8)
                _store(machine, "shared", where[0], data, where[1], number)

    return move


def compile_copy(machine, instruction: Instruction, number: int):
    """cp.async: what is copied arrives when its group is waited for, not before."""
    kind = instruction.parts[2]
    if kind == "commit_group":

        def commit(mask) -> None:
            machine.copy_group[... if mask is None else mask] += 1

        return commit
    if kind == "wait_group":
        left = instruction.operands[0].value
        return lambda mask: _finish_copies(machine, left, mask)
    target, source, size, *taken = instruction.operands
    width = size.value
    read_target = machine.reader(target.value[0], u32)
    read_source = machine.reader(source.value[0], u64)
    read_taken = machine.reader(taken[0], u32) if taken else None

    def copy(mask) -> None:
        lanes, at = machine.per_lane(read_target, mask)
        at = at.astype(np.int64) + target.value[1]
        address = machine.per_lane(read_source, mask)[1].astype(np.int64) + source.value[1]
        wanted = np.full(len(lanes), width)
        if read_taken:
            wanted = machine.per_lane(read_taken, mask)[1]
        if not np.isin(wanted, (0, width)).all():
            raise NotImplementedError(instruction.text)
        some = wanted > 0
        _check_aligned(at, width)
        _check_aligned(address[some], width)
        data = np.zeros((len(lanes), width), np.uint8)
        if some.any():
            data[some] = _load(machine, "global", address[some], width, lanes[some], number)
        machine.shared.await_copy(at, width, lanes)
        machine.copies.append((lanes, machine.copy_group[lanes].copy(), at, data, number))

    return copy


def _finish_copies(machine, left: int, mask) -> None:
    waiting = np.ones(machine.count, bool) if mask is None else mask
    still = []
    for lanes, group, at, data, number in machine.copies:
        done = (group < machine.copy_group[lanes] - left) & waiting[lanes]
        if done.any():
            _store(machine, "shared", at[done], data[done], lanes[done], number)
        if not done.all():
            keep = ~done
            still.append((lanes[keep], group[keep], at[keep], data[keep], number))
    machine.copies = still
