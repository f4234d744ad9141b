"""Changes one instruction of a kernel's PTX, as a slip in the compiler or in our source would."""

import random
import re

OTHER = {
    "add.s64": "sub.s64", "add.s32": "sub.s32", "sub.s32": "add.s32",
    "mul.f32": "add.f32", "add.f32": "sub.f32", "sub.f32": "add.f32",
    "mul.rn.f32": "add.rn.f32", "add.rn.f32": "sub.rn.f32", "sub.rn.f32": "add.rn.f32",
    "setp.lt.s32": "setp.gt.s32", "setp.gt.s32": "setp.lt.s32", "setp.ge.s32": "setp.lt.s32",
    "setp.eq.b32": "setp.ne.b32", "setp.ne.b32": "setp.eq.b32", "min.s32": "max.s32",
    "setp.eq.s32": "setp.ne.s32", "setp.ne.s32": "setp.eq.s32",
    "shl.b64": "shr.u64", "shl.b32": "shr.u32", "and.b32": "or.b32", "or.b32": "and.b32",
}  # fmt: skip
ORDERED = ("sub", "selp", "fma", "setp", "div")
CODE = re.compile(r"\s+(@!?%p\d+ )?([a-z]\w*(?:\.\w+)+)\s+(.*);$")


def other_opcode(line, match, rng):
    return line.replace(match[2], OTHER.get(match[2], match[2]), 1)


def other_number(line, match, rng):
    if number := re.search(r", (-?\d+);$", line):
        changed = int(number[1]) + rng.choice((-1, 1, 2))
        return line[: number.start()] + f", {changed};"
    if number := re.search(r"0f([0-9A-F]{8})", line):
        return line.replace(number[0], f"0f{int(number[1], 16) ^ 0x00400000:08X}", 1)
    return line


def other_order(line, match, rng):
    parts = match[2].split(".")
    if parts[0] not in ORDERED or {"eq", "ne"} & set(parts):
        return line
    operands = [operand.strip() for operand in match[3].split(",")]
    first = len(operands) - 2 if match[2].startswith("fma") else 1
    operands[first], operands[first + 1] = operands[first + 1], operands[first]
    return line.replace(match[3], ", ".join(operands))


def other_offset(line, match, rng):
    """Of an access, in bytes of a small type; of a shuffle, in lanes."""
    if match[2].startswith("shfl"):
        return re.sub(r", (\d+), (\d+), -1;$", lambda m: f", {int(m[1]) ^ 1}, {m[2]}, -1;", line)
    return re.sub(r"\+ (-?\d+) \]", lambda m: f"+ {int(m[1]) + rng.choice((-4, 4, 16))} ]", line)


def no_guard(line, match, rng):
    return line.replace(match[1], "", 1) if match[1] else line


def other_register(line, match, rng):
    target, _, sources = match[3].partition(",")
    found = list(re.finditer(r"%r(\d+)\b", sources))
    if not found or match[2].startswith(("st", "ld")):
        return line
    chosen = rng.choice(found)
    other = f"%r{int(chosen[1]) - 1}"
    changed = sources[: chosen.start()] + other + sources[chosen.end() :]
    return line.replace(match[3], f"{target},{changed}")


KINDS = other_opcode, other_number, other_order, other_offset, no_guard, other_register


def mutant(ptx: str, seed: int) -> tuple[str, str, str]:
    """The PTX with one line changed, that line before and after."""
    rng = random.Random(seed)
    start = ptx.index(".entry")
    head, lines = ptx[:start], ptx[start:].split("\n")
    matches = {k: match for k, line in enumerate(lines) if (match := CODE.match(line))}
    while True:
        k = rng.choice(list(matches))
        changed = rng.choice(KINDS)(lines[k], matches[k], rng)
        if changed != lines[k]:
            before, lines[k] = lines[k], changed
            return head + "\n".join(lines), before.strip(), changed.strip()
