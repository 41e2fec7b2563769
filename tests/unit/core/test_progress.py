"""Progress lines where there is no terminal: what is done, what is left, and a word on the state of the work."""

from __future__ import annotations

import logging

import pytest

from castune.core import progress as module
from castune.core.progress import progress


def test_lines_of_a_log_carry_the_note(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, logger="castune")
    with progress("training", 10) as advance:
        for step in range(1, 11):
            now += 30
            advance.note = f"loss {step}"
            advance()
    # A line a minute, none for the end.
    assert [record.getMessage() for record in caplog.records] == [
        f"training: {10 * step} %, {step // 2:02d}:00 elapsed, about {(10 - step) // 2:02d}:00 left, loss {step}"
        for step in (2, 4, 6, 8)
    ]


def test_without_a_note_a_line_ends_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO, logger="castune")
    with progress("ablations", 4.0) as advance:
        now = 100
        advance(1.0)
    assert caplog.messages == ["ablations: 25 %, 01:40 elapsed, about 05:00 left"]
