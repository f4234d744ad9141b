"""Runs a parsed kernel on a grid of blocks: a lane per thread, some blocks at a time, in NumPy.

The lanes that run together execute in lockstep, those at the lowest position first, so branches
rejoin where the compiler wrote them to.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .accesses import compile_access, compile_atomic, compile_copy, compile_matrix
from .arithmetic import (
    F,
    S,
    U,
    f32,
    from_bf16,
    meaning,
    to_bf16,
    to_half,
    type_of,
    u32,
    u64,
)
from .memory import Fault, GlobalMemory, SharedMemory
from .order import stamps_of
from .program import Instruction, Operand, Program, bits_of
from .traffic import WARP, Traffic

# What a register holds that nobody wrote; LLVM packs such halves and never uses them.
UNDEFINED = 0x7FBADBAD7FBADBAD
TOGETHER = 64  # blocks

Mask = np.ndarray | None  # which lanes take part; None: all
Run = Callable[[Mask], None]


class Machine:
    """One launch of `program` with 64- or 32-bit `arguments`, given as arrays of one element."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        arguments: Sequence[np.ndarray],
        grid: tuple[int, int, int],
        shared_bytes: int,
        traffic: Traffic | None = None,
        most_steps: int = 2**24,
    ) -> None:
        self.program, self.memory, self.arguments = program, memory, arguments
        self.grid, self.shared_bytes, self.traffic = grid, shared_bytes, traffic
        self.steps_left = most_steps
        self.run_of = []
        for position, instruction in enumerate(program.code):
            with self._naming(position):
                self.run_of.append(self._compile(instruction, position))

    def run(self, blocks: Sequence[int] | None = None) -> None:
        """Run the given blocks, by default all, and check what only the end shows."""
        if blocks is None:
            blocks = range(int(np.prod(self.grid)))
        self._run(blocks)
        position = self.memory.poison_races()
        if position is not None:
            self.traffic = None
            self._run(blocks)
            with self._naming(position):
                self.memory.check_results()

    def _run(self, blocks: Sequence[int]) -> None:
        for first in range(0, len(blocks), TOGETHER):
            self._start(np.array(blocks[first : first + TOGETHER]))
            with np.errstate(all="ignore"):
                self._execute()

    def _start(self, blocks: np.ndarray) -> None:
        threads = self.program.threads
        self.count = len(blocks) * threads
        self.lanes = np.arange(self.count)
        self.blocks = np.repeat(blocks, threads)
        self.thread = (self.lanes % threads).astype(u32)
        self.global_thread = self.blocks.astype(np.int64) * threads + self.thread
        self.registers: list[np.ndarray | None] = [None] * len(self.program.registers)
        self.shared = SharedMemory(len(blocks), self.shared_bytes, threads)
        # Copies under way, and the group that each lane's next copy belongs to.
        self.copies: list[tuple] = []
        self.copy_group = np.zeros(self.count, np.int64)

    def stamps(self, lanes: np.ndarray) -> np.ndarray:
        """Who accesses global memory, and when (order.py)."""
        barriers = self.shared.barriers[lanes // self.program.threads]
        return stamps_of(barriers, self.global_thread[lanes])

    def _execute(self) -> None:
        code = self.program.code
        waiting = {0: np.ones(self.count, bool)}  # lanes by position
        while waiting:
            at = min(waiting)
            lanes = waiting.pop(at)
            while at < len(code) and lanes.any():
                if at in waiting:
                    lanes = lanes | waiting.pop(at)
                if waiting and at > min(waiting):
                    waiting[at] = lanes
                    break
                self.steps_left -= 1
                if self.steps_left < 0:
                    raise Fault(f"{self.program.name} does not end")
                instruction = code[at]
                taken = self._taken(instruction, lanes)
                at += 1
                if instruction.parts[0] in ("ret", "bra", "brx"):
                    lanes = lanes & ~taken
                    for target, some in self._targets(instruction, taken):
                        waiting[target] = waiting.get(target, False) | some
                    if waiting and not lanes.any():
                        at = min(waiting)
                        lanes = waiting.pop(at)
                elif taken.any():
                    self._step(at - 1, None if taken.all() else taken)

    def _targets(self, instruction: Instruction, taken: np.ndarray):
        """(position, lanes) of the places that lanes jump to."""
        labels, *operands = self.program.labels, *instruction.operands
        if instruction.parts[0] == "bra" and taken.any():
            yield labels[operands[-1].value], taken
        elif instruction.parts[0] == "brx":
            index = np.broadcast_to(self.reader(operands[0], u32)(), (self.count,))
            for k, label in enumerate(self.program.tables[operands[1].value]):
                if (taken & (index == k)).any():
                    yield labels[label], taken & (index == k)

    def _taken(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        if instruction.guard is None:
            return lanes
        held = self.get(instruction.guard)
        return lanes & (~held if instruction.is_negated else held)

    def _step(self, at: int, mask: Mask) -> None:
        with self._naming(at):
            self.run_of[at](mask)

    @contextlib.contextmanager
    def _naming(self, position: int) -> Iterator[None]:
        """Errors name the instruction and its line in the Triton source."""
        try:
            yield
        except (Fault, NotImplementedError) as error:
            instruction = self.program.code[position]
            where = f"{self.program.name} {instruction.place}: {instruction.text}"
            raise type(error)(f"{error}\n  at {where}") from None

    # Registers and operands
    def get(self, index: int) -> np.ndarray:
        value = self.registers[index]
        if value is None:
            name, bits = self.program.registers[index]
            if bits == 1:
                raise Fault(f"predicate {name} is read before it is written")
            value = np.full(self.count, UNDEFINED % 2**bits, U[bits])
        return value

    def put(self, operand: Operand, value: np.ndarray, mask: Mask) -> None:
        index, bits = operand.value
        if bits > 1:
            if value.dtype.itemsize * 8 != bits:
                value = value.astype((S if value.dtype.kind == "i" else U)[bits])
            value = value.view(U[bits])
        if value.shape != (self.count,):
            value = np.broadcast_to(value, (self.count,))
        if mask is not None:
            before = self.registers[index]
            undefined = value.dtype.type(UNDEFINED % 2**bits if bits > 1 else False)
            value = np.where(mask, value, undefined if before is None else before)
        self.registers[index] = value

    def per_lane(self, read: Callable[[], np.ndarray], mask: Mask) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that take part, and an operand's values in them."""
        lanes = self.lanes if mask is None else np.nonzero(mask)[0]
        return lanes, np.broadcast_to(read(), (self.count,))[lanes]

    def reader(self, operand: Operand, kind: type) -> Callable[[], np.ndarray]:
        """A function that gives an operand's values as the NumPy type `kind`."""
        dtype = np.dtype(kind)
        if operand.kind == "register":
            index, bits = operand.value
            if kind is np.bool_ or dtype.itemsize * 8 == bits:
                return lambda: self.get(index).view(dtype)
            unsigned = U[dtype.itemsize * 8]
            return lambda: self.get(index).astype(unsigned).view(dtype)
        if operand.kind in ("integer", "float"):
            bits = operand.value % 2 ** (8 * dtype.itemsize)
            value = np.array([bits], U[8 * dtype.itemsize]).view(dtype)
            return lambda: value
        if operand.kind == "special":
            return lambda: self._special(operand.value).astype(dtype)
        return lambda: np.zeros(1, dtype)  # the array in shared memory, which starts it

    def _special(self, name: str) -> np.ndarray:
        base, _, axis = name.partition(".")
        k = "xyz".index(axis) if axis else 0
        if base == "%tid":
            return self.thread if k == 0 else np.zeros(self.count, u32)
        if base == "%ctaid":
            return self.blocks // int(np.prod(self.grid[:k])) % self.grid[k]
        if base == "%laneid":
            return self.thread % u32(WARP)
        sizes = {"%ntid": (self.program.threads, 1, 1), "%nctaid": self.grid}
        return np.array([sizes[base][k]])

    # Instructions
    def _compile(self, instruction: Instruction, number: int) -> Run | None:
        base, parts = instruction.parts[0], instruction.parts
        if base in ("ret", "bra", "brx"):
            return None
        if base in ("ld", "st"):
            return compile_access(self, instruction, number)
        if base == "atom":
            return compile_atomic(self, instruction)
        if base in ("ldmatrix", "stmatrix"):
            return compile_matrix(self, instruction, number)
        if base == "cp":
            return compile_copy(self, instruction, number)
        if base in ("bar", "barrier"):
            if "warp" in parts or [each.value for each in instruction.operands] != [0]:
                raise NotImplementedError("a barrier of some threads")
            return self._barrier
        special = {"shfl": self._shuffle, "mov": self._move, "cvt": self._convert}
        return special.get(base, self._arithmetic)(instruction)

    def _barrier(self, mask: Mask) -> None:
        self.shared.barrier(np.ones(self.count, bool) if mask is None else mask)

    def _arithmetic(self, instruction: Instruction) -> Run:
        target, *sources = instruction.operands
        if instruction.parts[0] == "cvta":
            read = self.reader(sources[0], u64)
            return lambda mask: self.put(target, read(), mask)
        function, kinds = meaning(instruction.parts)
        reads = [self.reader(*pair) for pair in zip(sources, kinds, strict=True)]
        is_division = instruction.parts[0] in ("div", "rem") and kinds[0] not in F.values()

        def compute(mask: Mask) -> None:
            if is_division and (self.per_lane(reads[1], mask)[1] == 0).any():
                raise Fault("division by zero")
            self.put(target, function(*(read() for read in reads)), mask)

        return compute

    def _move(self, instruction: Instruction) -> Run:
        """Copies, and what packs several registers into one or unpacks it."""
        target, source = instruction.operands
        bits = bits_of(instruction.parts[-1])
        if source.kind == "vector":
            width = bits // len(source.value)
            pieces = [self.reader(part, U[width]) for part in source.value]

            def pack(mask: Mask) -> None:
                value = np.zeros(1, U[bits])
                for k, piece in enumerate(pieces):
                    value = value | piece().astype(U[bits]) << U[bits](k * width)
                self.put(target, value, mask)

            return pack
        read = self.reader(source, U[bits])
        if target.kind != "vector":
            return lambda mask: self.put(target, read(), mask)
        width = bits // len(target.value)

        def unpack(mask: Mask) -> None:
            value = read()
            for k, part in enumerate(target.value):
                if part.kind == "register":
                    self.put(part, (value >> U[bits](k * width)).astype(U[width]), mask)

        return unpack

    def _convert(self, instruction: Instruction) -> Run:
        target, *sources = instruction.operands
        to, given = instruction.parts[-2:]
        if not {"cvt", "rn", "rzi", "rni", "rmi", "rpi", to, given} >= set(instruction.parts):
            raise NotImplementedError(instruction.opcode)
        narrow = to_bf16 if to.startswith("bf16") else to_half
        if to in ("bf16x2", "f16x2"):
            high, low = (self.reader(source, f32) for source in sources)

            def both(mask: Mask) -> None:
                halves = narrow(high()).astype(u32) << u32(16) | narrow(low()).astype(u32)
                self.put(target, halves, mask)

            return both
        if given == "bf16":
            read = self.reader(sources[0], np.uint16)
            return lambda mask: self.put(target, from_bf16(read()), mask)
        if to == "bf16":
            read = self.reader(sources[0], f32)
            return lambda mask: self.put(target, to_bf16(read()), mask)
        result, read = type_of(to), self.reader(sources[0], type_of(given))
        if given[0] != "f" or to[0] == "f":
            return lambda mask: self.put(target, read().astype(result), mask)
        limits = np.iinfo(result)
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        rounded = whole[instruction.parts[1]]

        def to_integer(mask: Mask) -> None:
            value = np.nan_to_num(rounded(read().astype(np.float64)), nan=0.0)
            self.put(target, np.clip(value, limits.min, limits.max).astype(result), mask)

        return to_integer

    def _shuffle(self, instruction: Instruction) -> Run:
        mode, operands = instruction.parts[2], instruction.operands
        target, *valid = operands[: len(operands) - 4]
        read, other, clamp, members = (self.reader(each, u32) for each in operands[-4:])

        def shuffle(mask: Mask) -> None:
            lane = (self.lanes % WARP).astype(np.int64)
            by, bounds = other().astype(np.int64) & 31, clamp().astype(np.int64)
            segment = bounds >> 8 & 31
            limit = lane & segment | bounds & 31 & ~segment
            source = {
                "bfly": lambda: lane ^ by,
                "up": lambda: lane - by,
                "down": lambda: lane + by,
                "idx": lambda: lane & segment | by & ~segment & 31,
            }[mode]()
            is_valid = source >= limit if mode == "up" else source <= limit
            at = self.lanes - lane + np.where(is_valid, source, lane)
            named = np.broadcast_to(members() >> lane.astype(u32) & u32(1) == 1, (self.count,))
            active = np.ones(self.count, bool) if mask is None else mask
            in_use = active.reshape(-1, WARP).any(1).repeat(WARP)
            if (active != named)[in_use].any() or not named[at[active]].all():
                raise Fault("shfl.sync that not all the lanes it names reach")
            self.put(target, np.broadcast_to(read(), (self.count,))[at], mask)
            for predicate in valid:
                self.put(predicate, is_valid, mask)

        return shuffle
