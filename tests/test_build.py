"""The package as it is installed: imports, public names, messages of a broken installation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import revbifpn_kernels
from revbifpn_kernels._extension import OLDEST_TORCH, require_supported_torch

PACKAGE = Path(revbifpn_kernels.__file__).parent


def run_python(code, path=PACKAGE.parent, check=True):
    """The finished process of `python -c code`, which sees the package in `path`."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(path)},
        cwd=path,
        check=check,
        capture_output=True,
        text=True,
    )


def test_import_has_no_side_effects():
    code = """
import os, sys, threading, warnings
import torch
before = dict(os.environ), torch.get_num_threads(), torch.get_rng_state(), threading.active_count()
warnings.simplefilter("error")
import revbifpn_kernels
slow = {"timm", "torchvision", "safetensors", "torch._dynamo", "torch._inductor"}
assert not slow & set(sys.modules), "importing takes seconds"
assert dict(os.environ) == before[0], "the environment changed"
assert torch.get_num_threads() == before[1]
assert torch.equal(torch.get_rng_state(), before[2])
assert threading.active_count() == before[3]
assert not torch.cuda.is_initialized()
"""
    assert run_python(code).stderr == ""


def test_missing_extension_gives_the_command(tmp_path):
    copy = tmp_path / "revbifpn_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable installation would find its own extension for the copy.
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
import revbifpn_kernels
"""
    result = run_python(code, path=tmp_path, check=False)
    last_lines = result.stderr.partition("ImportError: revbifpn_kernels: the compiled")[2]
    assert "extension revbifpn_kernels._C cannot be loaded" in last_lines
    for command in (".", "--editable ."):
        assert f"\n    pip install --no-build-isolation {command}\n" in last_lines


def test_the_extension_brings_no_openmp():
    """The threads are torch's: a second runtime would start its own beside them."""
    binary = Path(revbifpn_kernels._C.__file__).read_bytes()
    names = b"libgomp", b"libomp", b"libiomp", b"GOMP_", b"__kmpc_", b"omp_get_"
    assert [name for name in names if name in binary] == []


def test_operators_run_on_the_threads_of_torch():
    code = """
import os
import torch
from revbifpn_kernels import resample_add
torch.set_num_threads(3)
x, source = torch.empty(1, 8, 256, 256), torch.empty(1, 8, 128, 128)
before = set(os.listdir("/proc/self/task"))
resample_add(x, [source])
assert len(set(os.listdir("/proc/self/task")) - before) == 2
"""
    run_python(code)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128", "2.10.0"])
def test_an_old_torch_is_refused(version):
    with pytest.raises(ImportError, match=rf"torch >= 2.11, found torch {re.escape(version)}"):
        require_supported_torch(version)


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git1234", "2.12.0+cu130", "2.100.0", "3.0.0.dev20300101"]
)
def test_new_torches_are_accepted(version):
    assert require_supported_torch(version) is None
    assert OLDEST_TORCH == (2, 11)


def test_public_names():
    assert isinstance(revbifpn_kernels.SIZES, dict)  # the one constant
    for name in set(revbifpn_kernels.__all__) - {"SIZES"}:
        assert callable(getattr(revbifpn_kernels, name)), name
        assert getattr(revbifpn_kernels, name).__doc__, f"{name} has no docstring"
    assert set(revbifpn_kernels.__all__) == {
        *"Config DetectionBackbone MBConv Recomputed RevBiFPN RevBlock RevLevels RevSilo".split(),
        *"Reversible ReversibleSequential SIZES create_model load_official macs".split(),
        *"resample_add resample_add_ resample_adjoint resample_undo to_official".split(),
        *"capture_step convert_sync_batchnorm training_memory".split(),
        *(f"revbifpn_s{k}" for k in range(7)),
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", revbifpn_kernels.__version__)


def test_type_hints_are_announced():
    assert (PACKAGE / "py.typed").is_file()
