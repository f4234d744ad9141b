"""Small networks: threads of two test processes would wait for each other."""

import pytest
from captures import Graph, capture_on_cpus


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Lets steps be captured without a GPU; the graphs that were captured."""
    return capture_on_cpus(monkeypatch)
