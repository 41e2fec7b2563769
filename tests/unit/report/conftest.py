from __future__ import annotations

import pytest
from fake_run import Run, make_run


@pytest.fixture
def run() -> Run:
    return make_run()
