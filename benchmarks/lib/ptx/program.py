"""Parses the PTX of one Triton kernel into instructions whose operands are resolved."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple


class Operand(NamedTuple):
    """What an instruction names.

    kind       value
    register   (index, bits)            a predicate has 1 bit
    integer    int
    float      the bits, 32 or 64 of them
    special    %tid.x, %ctaid.y, …
    symbol     an array in shared memory, a label or a kernel parameter
    vector     list of operands
    address    (base operand, offset)
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate register it runs under, if any."""

    opcode: str
    operands: list[Operand]
    guard: int | None
    is_negated: bool
    place: str  # file:line of the Triton source
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Program:
    """A kernel's code; labels are positions in it, tables list the labels of a branch by index."""

    name: str
    parameters: list[str]  # types
    code: list[Instruction]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    registers: list[tuple[str, int]]  # name, bits
    threads: int


def bits_of(kind: str) -> int:
    """Of a PTX type such as f32, b64 or pred."""
    return 1 if kind == "pred" else int(re.search(r"\d+$", kind).group())


class _Scopes:
    """Registers by name; braces open scopes of their own."""

    def __init__(self) -> None:
        self.registers: list[tuple[str, int]] = []
        self.open: list[dict[str, int]] = [{}]

    def declare(self, kind: str, names: str) -> None:
        for name in (entry.strip() for entry in names.split(",")):
            stem, _, count = name.rstrip(">").partition("<")
            for each in [f"{stem}{k}" for k in range(int(count))] if count else [stem]:
                self.open[-1][each] = len(self.registers)
                self.registers.append((each, bits_of(kind)))

    def find(self, name: str) -> int | None:
        return next((scope[name] for scope in reversed(self.open) if name in scope), None)

    def operand(self, token: str) -> Operand:
        token = token.strip()
        if token.startswith("{"):
            return Operand("vector", [self.operand(part) for part in token[1:-1].split(",")])
        if token.startswith("["):
            base, offset = re.fullmatch(
                r"\[([^+]+)(?:\+(-?\d+))?\]", token.replace(" ", "")
            ).groups()
            return Operand("address", (self.operand(base), int(offset or 0)))
        index = self.find(token)
        if index is not None:
            return Operand("register", (index, self.registers[index][1]))
        if re.match(r"0[fd][0-9A-Fa-f]+$", token):
            return Operand("float", int(token[2:], 16))
        if re.match(r"-?\d", token):
            return Operand("integer", int(token, 0))
        return Operand("special" if token.startswith("%") else "symbol", token)


def _instruction(statement: str, scopes: _Scopes, place: str) -> Instruction:
    guard, is_negated, rest = None, False, statement
    if match := re.match(r"@(!?)(%?\w+)\s+(.*)", statement, re.S):
        is_negated, rest = match[1] == "!", match[3]
        guard = scopes.find(match[2])
    opcode, _, given = rest.partition(" ")
    tokens = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+", given)
    operands = [scopes.operand(token) for token in tokens]
    opcode = opcode.replace("shared::cta", "shared")  # as Triton 3.8 writes it
    return Instruction(opcode, operands, guard, is_negated, place, statement)


def _statements(body: str):
    """Labels, braces and statements in order, each with its .loc (file number, line)."""
    place, pending = None, ""
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if loc := re.match(r"\.loc\s+(\d+) (\d+) ", line):
            place = loc.groups()
            continue
        if label := re.match(r"(\$\w+):", line):
            yield label[1] + ":", place
            line = line[label.end() :]
        pending = f"{pending} {line}".strip()
        # A brace that opens a statement opens a scope; one inside is a vector operand's.
        while match := re.match(r"([{}])\s*|([^;]*);\s*", pending):
            pending = pending[match.end() :]
            yield (match[1] or match[2]).strip(), place


def parse(text: str) -> Program:
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text))
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{(.*)", text, re.S)
    name, signature, head, body = entry.groups()
    scopes, code, labels, tables, label = _Scopes(), [], {}, {}, ""
    for statement, place in _statements(body):
        if statement == "{":
            scopes.open.append({})
        elif statement == "}":
            scopes.open.pop()
            if not scopes.open:
                break
        elif statement.endswith(":"):
            label = statement[:-1]
            labels[label] = len(code)
        elif statement.startswith(".branchtargets"):
            tables[label] = statement.split(None, 1)[1].replace(",", " ").split()
        elif declared := re.match(r"\.reg \.(\w+)\s+(.*)", statement):
            scopes.declare(declared[1], declared[2])
        elif statement and not statement.startswith("."):
            where = f"{files[place[0]]}:{place[1]}" if place else ""
            code.append(_instruction(statement, scopes, where))
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", head)[1])
    parameters = re.findall(r"\.param \.(\w+)", signature)
    return Program(name, parameters, code, labels, tables, scopes.registers, threads)
