"""docs/walks.md: every room it names is there, holds what is said of it, and no walk is longer than twelve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "castune"
WALKS = (ROOT / "docs" / "walks.md").read_text(encoding="utf-8").split("\n## ")[1:]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.splitlines()[0])
def test_a_walk_leads_through_rooms_that_are_there(walk: str) -> None:
    steps = re.findall(r"^\d+\. `([\w/]+\.py)` `(\w+)`:", walk, re.MULTILINE)
    assert 3 < len(steps) == len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 12
    for file, name in steps:
        assert re.search(rf"^(?:def|class) {name}\b", (PACKAGE / file).read_text(encoding="utf-8"), re.MULTILINE), name
    for file in re.findall(r"`([\w/]+\.py)`", walk):
        assert list(PACKAGE.rglob(file)), file


def test_there_are_four_walks() -> None:
    assert len(WALKS) == 4
