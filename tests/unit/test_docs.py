"""Documentation that repeats facts of the code says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from castune.config import EvaluateConfig
from castune.data.named import NAMED_SOURCES, NamedSource
from castune.data.sources import SOURCE_NAMES, purpose_of
from castune.evaluation.suites import PURPOSES

EVALUATION = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.parametrize("name", NAMED_SOURCES)
def test_the_table_of_suites_is_that_of_the_code(name: str) -> None:
    source: NamedSource = NAMED_SOURCES[name]
    [line] = [line for line in EVALUATION.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    place = ", ".join(part for part in (source.config, source.split) if part)
    size = "" if source.size is None else f"{source.size:,}"
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    gated = "yes" if source.gated else ""
    assert cells == [f"`{name}`", source.purpose, f"`{source.hub_id}`", place, size, source.licence, gated]


def test_the_help_of_suites_names_those_of_the_code() -> None:
    """`castune evaluate --help` and the reference of recipes: every source that is a suite, but those to train on."""
    described = EvaluateConfig.model_fields["suites"].description or ""
    named = described.removeprefix("Data sources:").partition(".")[0].replace(",", " ").split()
    to_train_on = {"starter-utility", "starter-safety", "starter-borderline", "wildjailbreak-vanilla-harmful"}
    assert len(set(named)) == len(named)
    assert set(named) == {name for name in SOURCE_NAMES if purpose_of(name) in PURPOSES} - to_train_on
