"""What every test runs under: fixed seeds, NaN in unwritten elements."""

import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# An installed library comes first; without one, the tests take the sources that lie beside them.
sys.path.append(str(ROOT))

# Tests compare float32 with float32: without TF32, and with cuBLAS in deterministic mode as below.
torch.backends.cudnn.allow_tf32 = False
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long or large; runs when asked for by -m or node id")
    config.addinivalue_line(
        "markers",
        "gpu: what a GPU adds, Triton's kernels and what calls them: pytest -m 'gpu and not slow'",
    )


def pytest_itemcollected(item):
    """Mark the tests whose parameters name what runs on a GPU."""
    if re.search(r"\[.*(triton|cuda)", item.nodeid):
        item.add_marker("gpu")


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests unless they are asked for."""
    if config.getoption("-m") or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_fill():
    """Fill every `empty` with NaN, so that an output element nobody wrote shows.

    On GPUs the mode replaces F.interpolate by operations that turn inf into NaN: references are
    taken on the CPU.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For modules of many small operators: threads of two test processes wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
