from __future__ import annotations

import pytest
from tiny_runs import one_thread


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("slow"):  # a real training: it takes what the machine has
        yield
        return
    with one_thread():
        yield
