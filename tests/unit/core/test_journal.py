"""Journals: what was written is read, from any number of writers; whatever was cut off or changed is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castune.core.journal import Journal

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
RECORDS = st.lists(
    st.dictionaries(st.text(), VALUES | st.lists(VALUES, max_size=3), max_size=3), min_size=1, max_size=4
)
PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def journal_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Journal]:
    return lambda: Journal.of(tmp_path_factory.mktemp("run"), {"model": "m"})


def file_of(journal: Journal) -> Path:
    assert journal.folder is not None
    (path,) = journal.folder.glob("*.jsonl")
    return path


@given(records=RECORDS)
@PROPERTY
def test_what_was_written_is_read(journal_of: Callable[[], Journal], records: list[dict[str, object]]) -> None:
    journal = journal_of()
    for record in records:
        journal.append(record)
    assert list(journal.records()) == records


@given(records=RECORDS, data=st.data())
@PROPERTY
def test_lines_that_changed_are_skipped_and_told(
    journal_of: Callable[[], Journal], records: list[dict[str, object]], data: st.DataObject
) -> None:
    journal = journal_of()
    for record in records:
        journal.append(record)
    path = file_of(journal)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    # All others are there, unchanged and in order.
    found = iter(records)
    read = list(journal.records())
    assert all(record in found for record in read)
    assert len(read) >= whole[:place].count(b"\n")


@pytest.mark.parametrize("line", ["1", "[" * 100_000, '["00000000", {}]', "\0" * 50, '{"set": "safety"}', "é\ud7ff"])
def test_what_no_journal_wrote_is_not_read(
    journal_of: Callable[[], Journal], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = journal_of()
    journal.append({"kept": 1})
    with file_of(journal).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with caplog.at_level(logging.WARNING, "castune"):
        assert list(journal.records()) == [{"kept": 1}]
    assert "line 2: truncated or changed; its content is measured again" in caplog.text
