"""Instruction sets with a fused multiply-add compute the same bits; REVBIFPN_ISA chooses one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

SWEEP = Path(__file__).parents[1] / "cpu_sweep.py"
OPS = "resample_add", "resample_adjoint", "resample_undo", "norm_act", "squeeze_excite", "depthwise"


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
def test_avx2_and_avx512_compute_the_same_bits():
    hashes = {isa: hash_of_results(isa).stdout for isa in ("avx2", "avx512")}
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_ops_pass_their_tests_by_every_instruction_set(isa):
    """Those of the C++ kernels, in a process of their own: the choice is read once."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "cpp"]
        + [str(Path(__file__).with_name(f"test_{name}.py")) for name in OPS],
        env=os.environ | {"REVBIFPN_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused():
    result = hash_of_results("sse9", check=False)
    assert "REVBIFPN_ISA must be baseline, avx2 or avx512, got sse9" in result.stderr
