"""Every instruction set computes the same bits; REVBIFPN_ISA, read once, chooses one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

SWEEP = Path(__file__).parents[1] / "cpu_sweep.py"


def hash_of_results(isa, check=True):
    """The finished process that runs every op by this instruction set and prints a hash."""
    return subprocess.run(
        [sys.executable, SWEEP],
        env=os.environ | {"REVBIFPN_ISA": isa, "PYTHONPATH": str(SWEEP.parents[1])},
        check=check,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not HAS_AVX512, reason="this processor has no AVX-512, so nothing can differ")
def test_every_instruction_set_computes_the_same_bits():
    hashes = {isa: hash_of_results(isa).stdout for isa in ("baseline", "avx2", "avx512")}
    assert len(set(hashes.values())) == 1, hashes


def test_an_unknown_instruction_set_is_refused():
    result = hash_of_results("sse9", check=False)
    assert "REVBIFPN_ISA must be baseline, avx2 or avx512, got sse9" in result.stderr
