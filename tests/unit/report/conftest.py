from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser
from fake_run import Run, make_run


@pytest.fixture
def run() -> Run:
    return make_run()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests: a test opens its own page in it."""
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
