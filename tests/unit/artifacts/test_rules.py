"""Artifacts of older rules say so when they are read, once, and what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import castune
from castune.artifacts import ConflictMap
from castune.artifacts.rules import _CHANGES, RULES, _warn, warn_of_old_rules
from castune.config import DiagnoseConfig
from castune.core.provenance import provenance
from castune.data.example import Example


@pytest.fixture(autouse=True)
def forget() -> None:
    _warn.cache_clear()


def test_every_number_of_rules_says_what_it_changed() -> None:
    assert list(_CHANGES) == list(range(2, RULES + 1))
    assert provenance()["rules"] == RULES


@pytest.mark.parametrize("kind", ["conflict map", "adapter", "evaluation"])
def test_older_rules_are_told_once_for_each_file(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    for made_by in ({}, {"rules": 1}):
        warn_of_old_rules("runs/x/a", kind, made_by)
    warn_of_old_rules("runs/x/b", kind, {"rules": RULES})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"runs/x/a: this {kind} was made under older rules of castune, by which")
    warn_of_old_rules("runs/x/b", kind, {})
    assert len(caplog.records) == 2


def test_a_map_made_now_says_nothing_and_one_from_before_does(
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    questions: list[Example],
    harmful: list[Example],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = DiagnoseConfig(measure="margin", max_new_tokens=4, gradient_chunks=2)
    made = castune.diagnose(tiny_model("llama"), tiny_tokenizer, safety=harmful, utility=questions, config=config)
    made.save(tmp_path)
    caplog.clear()
    ConflictMap.load(tmp_path)
    assert "older rules" not in caplog.text
    metadata = {**made.metadata, "provenance": {k: v for k, v in made.metadata["provenance"].items() if k != "rules"}}
    ConflictMap(made.table, metadata).save(tmp_path)
    ConflictMap.load(tmp_path)
    assert "O(h) of lettered questions was mostly the gradient of the end of the turn" in caplog.text
