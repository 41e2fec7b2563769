"""Final answers: a hand-made truth, written by someone who had not seen the code, and properties."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castune.evaluate.answers import final_answer, is_equal, is_right, last_boxed, stated_letter

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
SCORING = {"math": "boxed", "gsm8k": "number"}
# math-verify warns of what it cannot parse by raising inside and logging; antlr's runtime of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")


def outcome(case: dict[str, str]) -> bool | None:
    if case["kind"] == "letter":
        letter = stated_letter(case["reply"], 5 if case["target"] == "E" else 4)
        return None if letter is None else letter == case["target"]
    return is_right(case["reply"], case["target"], SCORING[case["kind"]])


def test_there_are_enough_cases_of_every_kind_and_outcome() -> None:
    assert len(CASES) >= 200
    counts = {(case["kind"], case["outcome"]) for case in CASES}
    assert counts == {(kind, found) for kind in ("math", "gsm8k", "letter") for found in (True, False, None)}


@pytest.mark.parametrize("kind", ["math", "gsm8k", "letter"])
def test_the_truth(kind: str) -> None:
    wrong = [
        (case["id"], case["reply"], case["target"], found, case["why"])
        for case in CASES
        if case["kind"] == kind and (found := outcome(case)) is not case["outcome"]
    ]
    assert not wrong


@given(st.text(alphabet="{}\\boxed 12,-./$fracx", max_size=60))
def test_no_text_is_too_strange(text: str) -> None:
    found = last_boxed(text)
    if found is not None:
        assert found in text
    final_answer(text, "number")
    stated_letter(text, 4)


@given(st.integers(-(10**6), 10**6), st.integers(1, 400))
def test_equal_fractions_are_equal(numerator: int, denominator: int) -> None:
    assert is_right(rf"So \boxed{{{numerator}}}.", str(numerator), "boxed")
    twice = rf"\frac{{{2 * numerator}}}{{{2 * denominator}}}"
    assert is_equal(twice, rf"\frac{{{numerator}}}{{{denominator}}}")
    assert is_right(f"#### {numerator}/{denominator}", f"{numerator}/{denominator}", "number")
    assert is_equal(rf"\frac{{{numerator + 1}}}{{{denominator}}}", rf"\frac{{{numerator}}}{{{denominator}}}") is False


@pytest.mark.parametrize(
    "reply",
    [
        r"\boxed{0.\overline{" + "3" * 5000 + "}}",
        r"\boxed{x_{" + "9" * 5000 + "}}",
        "#### " + "9" * 5000,
        "#### 0." + "3" * 4300,
        r"\boxed{" + "1" * 5000 + "}",
    ],
)
def test_answers_of_thousands_of_digits_are_unscored(reply: str) -> None:
    assert is_right(reply, "5", "boxed" if "boxed" in reply else "number") is None
    final_answer(reply, "number")


def test_an_answer_that_takes_for_ever_to_expand_is_not_waited_for() -> None:
    started = time.monotonic()
    assert is_equal(r"i + 9^{9^{9^{9}}} i", "5") is not True
    assert time.monotonic() - started < 60


def test_endless_answers_are_unscored() -> None:
    assert is_right(r"\boxed{" + "9^" * 2000 + "9}", "9", "boxed") is None
