"""What the command line shows: names and words of others are text, never markup; tables fit the terminal, whole."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from castune.console import show_rows
from castune.console_table import TextTable

SUITES: Sequence[Sequence[str | None]] = [
    ["starter-safety-eval", "0.188 ± 0.044 (80)", "0.975 ± 0.017 (80, 2 unscored)", "0.875 ± 0.037 (80)", None],
    ["starter-overrefusal-eval", "0.050 ± 0.035 (40)", "0.650 ± 0.075 (40)", "0.350 ± 0.075 (40)", "not measured"],
    ["nll:starter-solutions-eval", "1.234 ± 0.021 (50)", "1.387 ± 0.022 (50)", "1.271 ± 0.022 (50)", "not measured"],
    ["UCR", "", "0.15 (0.09 to 0.31)", "undefined", ""],
]
ARMS = ["suite", "base", "all", "safe", "bucket-2-of-4-sensitivity"]


def shown(table: TextTable, width: int) -> str:
    """What a console of that width prints."""
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    text = out.getvalue()
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert "…" not in text
    return text


def test_cells_and_heads_are_plain_text() -> None:
    text = shown(TextTable(["arm", "[/path]"], [["[bold]x", None], ["[red]", "[/z]"]]), 100)
    for part in ("[/path]", "[bold]x", "[red]", "[/z]", "–"):
        assert part in text


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60])
def test_every_name_and_number_of_a_table_is_shown_whole(width: int) -> None:
    text = shown(TextTable(ARMS, SUITES, title="Suites", caption="value ± standard error (n)"), width)
    for row in [ARMS, *SUITES]:
        for cell in row:
            for word in (cell or "").split():
                assert word in text
    # A value is never in another line than its error.
    assert text.count(" ± ") == sum((cell or "").count(" ± ") for row in SUITES for cell in row) + 1


def test_a_wide_table_wraps_and_a_wider_one_becomes_a_list() -> None:
    three = TextTable(ARMS[:4], [row[:4] for row in SUITES])
    assert "│ starter-safety-eval " in shown(three, 80)
    assert shown(TextTable(ARMS, SUITES), 80).startswith("suite: starter-safety-eval\n  base ")
    # Errors of many words would be columns of single words.
    long = TextTable(["unit", "error"], [["train", "word " * 100]])
    assert "│" not in shown(long, 80)


def test_words_that_are_longer_than_the_terminal_are_continued() -> None:
    path = "/a/very/long/path/" + "x" * 60
    text = shown(TextTable(["what", "where"], [["map", path]]), 40)
    assert path in text.replace("\n", "").replace(" ", "")


CELLS = st.text("ab ±-,.", max_size=40)


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(CELLS.filter(str.strip), min_size=n, max_size=n),
            st.lists(st.lists(CELLS, min_size=n, max_size=n), max_size=4),
        )
    ),
    st.integers(20, 120),
)
def test_no_table_is_wider_than_the_terminal_or_loses_a_letter(
    table: tuple[list[str], list[list[str]]], width: int
) -> None:
    heads, rows = table
    text = shown(TextTable(heads, rows), width)
    letters = sum(letter in "ab" for row in rows for cell in row for letter in cell)
    in_heads = sum(letter in "ab" for head in heads for letter in head)
    # A list repeats the heads.
    assert letters <= sum(letter in "ab" for letter in text) <= letters + in_heads * max(1, len(rows))


def test_rows_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"unit": "train/main/21/safe", "state": "failed", "error": "no space left on device " * 4, "nats": 0.125}]
    for columns in (80, 50):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_rows("Work", rows)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= columns
        assert text.count("device") == 4
        assert "0.12" in text


def test_into_a_file_a_table_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show_rows("Arms", [dict(zip(ARMS, row, strict=True)) for row in SUITES])
    assert "│ 0.975 ± 0.017 (80, 2 unscored) │" in capsys.readouterr().out
