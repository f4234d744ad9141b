"""The machine code of the CPU kernels: hot loops take whole vectors and keep them in registers.

No processor with the instruction set is needed: the compiler's assembly is read.
"""

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = (
    "-S -o - -std=c++20 -O3 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math "
    "-fvisibility=hidden -Wno-psabi"
).split()
REGISTERS = {"avx2": "ymm", "avx512": "zmm"}
# The function of each kernel that has its hot loop; what handles borders is not looked at.
HOT = (
    "update_elements<6, false, {}>",
    "sum_terms<6, {}>",
    "enlarge_columns<float>",
    "sum_weighted_rows<{}, float>",
    "gather_between<2, float>",
    "depthwise_input_units<{}>",
    "depthwise_weight_taps<5, {}>",
    "walk_plane<{isa}::Statistics, {}>",
    "walk_plane<{isa}::NormAct<(Act)2>, {}>",
    "walk_plane<{isa}::GradSums<(Act)2, true>, {}>",
    "walk_plane<{isa}::NormGrad<(Act)2>, {}>",
    "walk_pixels<{isa}::Statistics, {}>",
    "norm_act_units<{}>",  # with the walk over pixels inlined
    "walk_pixels<{isa}::GradSums<(Act)2, true>, {}>",
    "norm_grad_units<{}>",
)
SUM = r"\tv(?:fn?m(?:add|sub)\d+|add|sub|mul)"
PACKED, SCALAR = re.compile(SUM + r"p[sd]\s"), re.compile(SUM + r"s[sd]\s")
# Constants for which no register is left may be read from the stack, as operands.
SPILL = re.compile(r"\tv\w+\s+.*, -?\d*\(%r[sb]p\)$")


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


def is_clean(loop, register):
    """Whether a loop computes with these registers, with no scalar and without spilling."""
    return (
        any(PACKED.match(line) and register in line for line in loop)
        and not any(SCALAR.match(line) for line in loop)
        and not any(SPILL.match(line) for line in loop)
    )


def hottest(loops):
    """The loops with the most arithmetic on vectors; those over last elements have less."""
    counts = [sum(bool(PACKED.match(line)) for line in loop) for loop in loops]
    return [loop for loop, count in zip(loops, counts, strict=True) if count == max(counts)]


@functools.cache
def compiled(isa):
    command = ["g++", *FLAGS, str(CSRC / "isa" / f"{isa}.cpp")]
    return functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86-64"
)
@pytest.mark.parametrize("isa", REGISTERS)
def test_hot_loops_stay_in_registers(isa):
    found = compiled(isa)
    names = {name.format(T, isa=isa) for name in HOT for T in ("float", "BFloat16")}
    assert names <= found.keys(), names - found.keys()
    without = [
        name
        for name in sorted(names)
        if not any(is_clean(loop, REGISTERS[isa]) for loop in hottest(inner_loops(found[name])))
    ]
    assert not without, "the loop with most arithmetic spills, or computes single elements"


LOOP = """
.L2:
	vmovups	(%rdi,%rax), %ymm1
	vfmadd213ps	(%rsi,%rax), %ymm0, %ymm1
{}
	addq	$32, %rax
	cmpq	%rax, %rdx
	jne	.L2
"""


@pytest.mark.parametrize(
    "line, clean",
    [
        ("\tvmovups\t%ymm1, (%rdi,%rax)", True),
        ("\tvmovaps\t%ymm1, 32(%rsp)", False),
        ("\tvaddss\t%xmm1, %xmm2, %xmm2", False),
        ("\tcall\tmemcpy", False),
        (".L3:\n\tjne\t.L3", False),
    ],
)
def test_the_reader_of_loops(line, clean):
    loops = inner_loops(LOOP.format(line).splitlines())
    assert any(is_clean(loop, "ymm") for loop in loops) == clean
