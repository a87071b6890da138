from __future__ import annotations

import pytest
from tiny_runs import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield
