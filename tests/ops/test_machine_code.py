"""The machine code of the CPU kernels: their hot loops compute in registers, whole vectors at a time.

No processor with the instruction set is needed: the compiler's assembly is read.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = "-std=c++20 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
FLAGS += " -Wno-psabi -fPIC -S -o -"
REGISTERS = {"avx2": "ymm", "avx512": "zmm"}
# Kernels, and the loops of each that must be found; `{T}` is float or bfloat16.
HOT = (
    "update_elements<6, false, {T}>",
    "sum_terms<6, {T}>",
    "enlarge_planes<2, float>",
    "sum_weighted_rows<{T}, float>",
    "norm_act_units<float>",
    "norm_grad_units<float>",
    "depthwise_input_units<{T}>",
)
PACKED = re.compile(r"\tv(?:f(?:n?m(?:add|sub))\d+|add|sub|mul|max|min)p[sd]\s")
SCALAR = re.compile(r"\tv(?:f(?:n?m(?:add|sub))\d+|add|sub|mul|div|max|min)s[sd]\s")
SPILL = re.compile(r"\tvmov\w+\s+%[xyz]mm\d+, -?\d*\(%r[sb]p\)")


def functions(assembly):
    """The lines of each function, by its demangled name."""
    demangled = subprocess.run(
        ["c++filt"], input=assembly, capture_output=True, text=True, check=True
    ).stdout
    found, name = {}, None
    for line in demangled.splitlines():
        if match := re.match(r"(?:void )?revbifpn::\w+::(.*)\(.*\):$", line):
            name = match.group(1).replace("revbifpn::", "")
            found[name] = []
        elif line.startswith("\t.cfi_endproc"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def inner_loops(lines):
    """The lines of each loop, a label to the jump back to it, that holds no other and no call."""
    places = {line[:-1]: k for k, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    ends = {}
    for k, line in enumerate(lines):
        target = re.match(r"\tj\w+\s+(\.L\w+)$", line)
        if target and places.get(target.group(1), k) < k:
            ends[places[target.group(1)]] = k
    bodies = [lines[begin:end] for begin, end in ends.items()
              if not any(begin < other < end for other in ends)]  # fmt: skip
    return [body for body in bodies if not any("\tcall" in line for line in body)]
