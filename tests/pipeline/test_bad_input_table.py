"""The table of bad input: every case ends in the one line that the documentation shows, and leaves everything as it was."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from bad_input import CASES, PAGE, Case, finished_run, key, shown, what_it_says


@pytest.fixture(scope="module", autouse=True)
def _finished(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["CASTUNE_FINISHED_RUN"] = str(finished_run(tmp_path_factory.mktemp("finished")))


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(CASES) >= 60
    assert len({key(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=key)
def test_bad_input_is_told_as_documented(case: Case, tmp_path: Path) -> None:
    text = what_it_says(case, tmp_path)
    assert len(text) > 15
    section = PAGE.read_text(encoding="utf-8").partition(f"## {case.section}\n")[2].partition("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith(f"| {case.what} |"))
    # Words of libraries stand at the ends of some; numbers of a machine in others.
    documented = row.removeprefix(f"| {case.what} | `").removesuffix("` |").removesuffix(" ...")
    assert _words(shown(text))[:60] == _words(documented)[:60]


def _words(text: str) -> str:
    text = re.sub(r"[0-9a-f]{16}", "", text)
    return "".join(character for character in text if character.isalpha())
