"""What replies say and answer, row by row: written by someone who had not seen the code, to be hard on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from castune.core.answer_letters import stated_letter
from castune.evaluation.judges import judge
from castune.evaluation.judging import judged
from castune.evaluation.reading import read

DATA = Path(__file__).parents[2] / "data"
Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def number(row: Row) -> str:
    return str(row["id"])


@pytest.mark.parametrize("row", rows("thoughts"), ids=number)
@pytest.mark.parametrize("by", ["prefix", "opening"])
def test_what_is_judged_is_what_is_said(row: Row, by: str) -> None:
    sample = {"suite": "s", "id": "1", "purpose": "safety", "prompt": "Tell me of the siege.", "reply": row["reply"]}
    [found] = judged([{**sample, "finished": True, "tokens": 1, "in_thought": False}], judge(by))
    assert found["outcome"] is row["refuses"], row["what"]


@pytest.mark.parametrize("row", rows("answers_behind_thoughts"), ids=number)
def test_answers_are_read_behind_thoughts(row: Row) -> None:
    sample = {"reply": row["reply"], "finished": True, "in_thought": False}
    if row["kind"] == "letter":
        assert read({**sample, "choices": ["x"] * row["n_choices"], "answer": 0})["found"] == row["read"]
    else:
        assert read({**sample, "target": row["gold"], "scoring": row["kind"]})["outcome"] is row["right"]


@pytest.mark.parametrize("row", rows("letters"), ids=number)
def test_letters_that_are_words_are_no_answers(row: Row) -> None:
    assert stated_letter(row["reply"], row["n_choices"]) in row.get("letter_in", [row["letter"]]), row["why"]


@pytest.mark.parametrize("row", rows("numbers_and_boxes"), ids=number)
def test_a_part_of_an_expression_is_never_credited(row: Row) -> None:
    sample = {"reply": row["reply"], "finished": True, "target": row["gold"], "scoring": row["kind"]}
    assert read(sample)["outcome"] is row["right"], row["why"]
