"""Counts of instructions in listings written by hand."""

from benchmarks.lib.assembly import Instruction, Listing


def listing(*lines: str) -> Listing:
    """Of lines such as "label:", "FADD" and "BRA label"."""
    instructions, labels = [], {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(instructions)
        else:
            opcode, *label = line.split()
            instructions.append(Instruction(opcode, *label or [None]))
    return Listing(instructions, labels)


def test_a_loop_in_a_loop_beside_a_longer_one():
    nested = "images:", "LDG", "tiles:", "FADD", "BRA tiles", "BRA images"
    combining = "parts:", *["FMUL"] * 8, "BRA parts"
    # 4 + 9 once; 4 more per further image; 2 more per further tile of each image.
    assert listing(*nested, *combining).executed_nested(3, 5) == 13 + 2 * 4 + 3 * 4 * 2
