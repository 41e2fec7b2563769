"""Documentation that repeats facts of the code says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from castune.config import EvaluateConfig
from castune.data.named import NAMED_SOURCES, NamedSource
from castune.data.sources import SOURCE_NAMES, purpose_of
from castune.evaluation.suites import PURPOSES

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs", ROOT / "README.md"
EVALUATION = DOCS / "evaluation.md"
# The log is a record: what is in it stays as it was written.
PAGES = [README, ROOT / "CHANGELOG.md", *(page for page in sorted(DOCS.rglob("*.md")) if page.name != "log.md")]
# Pages that are read where they lie; links between those of the site are checked when it is built.
READ_IN_PLACE = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "recipes/README.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    # A row of a table cannot be broken.
    long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > 100 and line[0] != "|"]
    assert not long


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", READ_IN_PLACE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)]
    for link in links:
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place
        assert target.is_file(), link
        assert not anchor or anchor in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_results_page_has_every_table_of_the_log() -> None:
    log, results = (numbers_by_row(DOCS / name) for name in ("log.md", "results.md"))
    assert log - results == set()


def numbers_by_row(page: Path) -> set[tuple[str, ...]]:
    """The numbers in each row of a page's tables: words may differ, numbers may not."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return {tuple(re.findall(r"[-+−]?\d[\d.,]*", row)) for row in rows}
