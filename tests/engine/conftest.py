"""Small networks: threads of two test processes would wait for each other."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass
