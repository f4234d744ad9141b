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
from cases import CASES, DTYPES, random_factors, random_like
from squeeze_excite_cases import inputs
from torch.utils._pytree import tree_leaves
from revbifpn_kernels import resample_add, resample_undo

torch.manual_seed(0)
results = []
names = "odd channels-last-slice strided x2-x4-x8 mixed-powers area".split()
for k, name in enumerate(names):
    for dtypes in DTYPES:
        x, sources = CASES[name].tensors(dtypes)
        mode, lattice = (("bilinear", None), ("nearest", 0.125))[k % 2]
        options = {"mode": mode, "lattice": lattice}
        scales, shifts = random_factors(x, len(sources))
        results.append(resample_add(x, sources, alpha=0.7, **options))
        results.append(resample_add(x, sources, scales=scales, shifts=shifts, **options))
        results.append(resample_undo(x, random_like(x), sources, mode=mode))
for name in ("even", "odd", "long rows"):
    for dtype in (torch.float32, torch.float64):
        arguments = inputs(name, dtype)
        results.append(torch.ops.revbifpn.squeeze_excite_gates_backward(*arguments, "silu"))
digest = hashlib.sha256()
for tensor in tree_leaves(results):
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def hash_of_results(isa, check=True):
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    return subprocess.run(
        [sys.executable, "-c", HASH_RESULTS],
        env=os.environ | {"REVBIFPN_ISA": isa, "PYTHONPATH": path},
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
