"""Reads the machine code that the compiler made of a kernel: instructions, loops, registers."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its opcode with modifiers, and the label it may jump to."""

    opcode: str
    label: str | None


@dataclass(frozen=True)
class Listing:
    """A disassembly: instructions in order, and the position each label stands at."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def _jumps(self) -> list[tuple[int, int]]:
        """(first, last) instruction of every backward jump, the longest first."""
        jumps = [
            (self.labels[instruction.label], position)
            for position, instruction in enumerate(self.instructions)
            if self.labels.get(instruction.label, position) < position
        ]
        return sorted(jumps, key=lambda jump: jump[0] - jump[1])

    def loops(self, count: int) -> list[tuple[int, int]]:
        """(first, last) instruction of the `count` longest disjoint backward jumps, in order.

        Shorter ones are branches that rejoin, or the trap at the end.
        """
        chosen = []
        for first, last in self._jumps():
            if len(chosen) < count and all(last < a or first > b for a, b in chosen):
                chosen.append((first, last))
        return sorted(chosen)

    def executed(self, trips: list[int]) -> int:
        """Instructions a lane issues, both ways of a branch, if the loops run `trips` times."""
        repeats = [1] * len(self.instructions)
        loops = self.loops(len(trips))
        for (first, last), count in zip(loops, trips, strict=True):
            for position in range(first, last + 1):
                repeats[position] *= count
        return sum(
            count
            for count, instruction in zip(repeats, self.instructions, strict=True)
            if not instruction.opcode.startswith(("NOP", "s_nop"))
        )

    def executed_nested(self, outer: int, inner: int) -> int:
        """As `executed`, for a loop that runs `outer` times around one that runs `inner` times.

        It is the longest with a loop inside; others, such as those that combine parts, count once.
        """
        for first, last in self._jumps():
            labels = {label: at for label, at in self.labels.items() if first < at <= last}
            nested = Listing(self.instructions[:last], labels).loops(1)
            if nested:
                break
        else:
            raise ValueError("expected a loop in a loop, found none")
        ((start, end),) = nested
        around = last - first + 1
        within = end - start + 1
        return self.executed([]) + (outer - 1) * around + outer * (inner - 1) * within

    def widest(self, *patterns: str) -> int:
        """Bytes of the widest access whose opcode matches one of `patterns`."""
        opcodes = {i.opcode for i in self.instructions}
        return max(
            (_access_bytes(o) for o in opcodes if any(re.match(p, o) for p in patterns)), default=0
        )


def _access_bytes(opcode: str) -> int:
    if opcode.startswith(("LDG", "STG")):
        bits = re.search(r"\.(128|64|U16|S16|U8|S8|16)\b", opcode)
        return int(re.sub(r"\D", "", bits.group(1))) // 8 if bits else 4
    for suffix, size in (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4)):
        if suffix in opcode:
            return size
    return 2


def _parse(text: str, label_pattern: str, code_pattern: str) -> Listing:
    """Labels are what `label_pattern` finds, at a line's start or in an instruction's operands."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(rf"\s*({label_pattern}):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.match(code_pattern, line):
            target = re.search(label_pattern, code.group(2))
            instructions.append(Instruction(code.group(1), target.group(0) if target else None))
    return Listing(instructions, labels)


def inspect_cuda(kernel) -> tuple[Listing, dict]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [tools / "nvdisasm", "-c", file.name],
                [tools / "cuobjdump", "--dump-resource-usage", file.name],
            )
        )
    resources = {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
    }
    code = r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)"
    return _parse(sass, r"\.L_x_\d+", code), resources


def inspect_hip(kernel) -> tuple[Listing, dict]:
    text = kernel.asm["amdgcn"]
    resources = {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
        "spill_bytes": 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1)),
    }
    code = r"\t([svgbdf][a-z]*_\w+)\s*(.*)"
    return _parse(text.split(".Lfunc_end")[0], r"\.LBB\w+", code), resources
