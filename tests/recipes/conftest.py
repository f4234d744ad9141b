"""What all tests of the recipes run under, and the runs that several of them look at."""

import shutil
from pathlib import Path

import pytest
import torch
from trainings import few_digits, train, write_images

from revbifpn_kernels.recipes.classify import data

# All that draws numbers: order, augmentation, mixing, dropout, stochastic depth.
DRAWING = (
    *("--augment=affine", "--mixup=0.2", "--drop=0.2", "--drop-path=0.2"),
    *("--log-every=1", "--accumulate=2"),
)


def pytest_collection_modifyitems(items):
    quiet = pytest.mark.filterwarnings(
        "ignore:.*not found to be deterministic|.*does not have a det"
    )
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(quiet)


@pytest.fixture(autouse=True, scope="session")
def _few_digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_digits", few_digits)
        yield


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    yield


@pytest.fixture(scope="session")
def _trained(tmp_path_factory):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("runs") / "trained", *DRAWING)


@pytest.fixture
def trained(_trained, tmp_path):
    """A copy of a whole run with the options `DRAWING`."""
    return Path(shutil.copytree(_trained, tmp_path / "trained"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with two classes of 20 images."""
    return write_images(tmp_path_factory.mktemp("images") / "data", each=20)
