"""CITATION.cff repeats facts of the changelog and of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import castune

ROOT = Path(__file__).parents[2]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_cited_version_is_the_newest_of_the_changelog() -> None:
    version, date = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)[0]
    assert (CITATION["version"], CITATION["date-released"].isoformat()) == (version, date)
    assert castune.__version__ == version


@pytest.mark.parametrize("key", ["license", "keywords"])
def test_what_is_cited_is_what_is_packaged(key: str) -> None:
    assert CITATION[key] == PROJECT[key]


def test_versions_of_the_changelog_come_newest_first() -> None:
    titles = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    released = [
        re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", one) for one in titles if one != "[Unreleased]"
    ]
    assert all(released)
    keys = [(tuple(int(part) for part in one.groups()[:3]), one[4]) for one in released if one]
    assert keys == sorted(keys, reverse=True)
