"""Triton's interpreter, where a debugger stops inside a kernel, still takes the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests run on it")
def test_kernels_run_in_the_interpreter():
    files = "tests/ops/test_scaled_sources.py", "tests/ops/test_norm_act_excite.py"
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "triton and odd"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
