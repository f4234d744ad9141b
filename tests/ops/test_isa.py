"""Every instruction set computes the same bits; REVBIFPN_ISA, read once a process, chooses one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

# Prints one hash of all results; runs in a process of its own for each instruction set.
HASH_RESULTS = """
import hashlib, torch
import test_squeeze_excite as squeeze_excite
from cases import CASES, DTYPES, random_like
from test_scaled_sources import random_factors
from torch.utils._pytree import tree_leaves
from revbifpn_kernels import resample_add, resample_undo

torch.manual_seed(0)
digest = hashlib.sha256()
for name, case in CASES.items():
    for dtypes in DTYPES:
        x, sources = case.tensors(dtypes)
        grad = random_like(x)
        for mode, lattice in (("bilinear", None), ("nearest", 0.125)):
            y = resample_add(x, sources, alpha=0.7, mode=mode, lattice=lattice)
            scales, shifts = random_factors(x, len(sources))
            z = resample_add(x, sources, scales=scales, shifts=shifts, mode=mode, lattice=lattice)
            for tensor in tree_leaves((y, z, resample_undo(y, grad, sources, mode=mode))):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
for name in squeeze_excite.CASES:
    for dtype in squeeze_excite.DTYPES.values():
        arguments = squeeze_excite.inputs(name, dtype)
        for tensor in torch.ops.revbifpn.squeeze_excite_gates_backward(*arguments, "silu"):
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def hash_of_results(isa, check=True):
    tests, ops = Path(__file__).parents[1], Path(__file__).parent
    path = os.pathsep.join(map(str, (tests, ops, tests.parent)))
    return subprocess.run(
        [sys.executable, "-c", HASH_RESULTS],
        env=os.environ | {"REVBIFPN_ISA": isa, "PYTHONPATH": path},
        check=check,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not HAS_AVX512, reason="this processor has no AVX-512, so nothing can differ")
def test_every_instruction_set_computes_the_same_bits():
    hashes = {isa: hash_of_results(isa).stdout for isa in ("baseline", "avx2", "avx512")}
    assert len(set(hashes.values())) == 1, hashes


def test_an_unknown_instruction_set_is_refused():
    result = hash_of_results("sse9", check=False)
    assert "REVBIFPN_ISA must be baseline, avx2 or avx512, got sse9" in result.stderr
