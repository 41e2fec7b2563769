"""The worked solutions of the starter data: what they calculate is true, and ends in the answer."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from castune.core.answers import is_right
from castune.data.example import REASONING_INSTRUCTION, Example, require_solutions
from castune.data.sources import examples, purpose_of

SOURCE = "starter-solutions-eval"
NUMBER = r"\$?\d+(?:\.\d+)?"
CALCULATION = re.compile(rf"({NUMBER}(?: [-+*/] {NUMBER})+) = ({NUMBER})(?![\d.]*\d)")
PROBLEMS = examples(SOURCE)


def value(calculation: str) -> Fraction:
    """What a sum of products of numbers and dollars is."""
    total, product, sign, by = Fraction(0), None, 1, "*"
    for word in calculation.replace("$", "").split():
        if word in "*/":
            by = word
        elif word in "+-":
            assert product is not None
            total, product, sign, by = total + sign * product, None, 1 if word == "+" else -1, "*"
        else:
            number = Fraction(word)
            product = number if product is None else product * number if by == "*" else product / number
    assert product is not None
    return total + sign * product


def calculations(text: str) -> list[tuple[str, str]]:
    return CALCULATION.findall(text)


def test_the_check_of_calculations_checks() -> None:
    assert value("23 - 8 + 5") == 20
    assert value("2 + 3 * 4 - 6 / 4") == Fraction(25, 2)
    assert value("600 * 2 / 100") == 12
    assert value("4 * $1.50") == 6
    assert calculations("It is 3 * $4 = $12. Then 12 - 2.5 = 9.5 kg.") == [("3 * $4", "$12"), ("12 - 2.5", "9.5")]
    assert calculations("A day has 24 hours.") == []


@pytest.mark.parametrize("example", PROBLEMS, ids=lambda example: example.id)
def test_a_solution_is_right(example: Example) -> None:
    assert example.reply is not None
    assert example.target is not None
    worked, _, end = example.reply.rpartition("\n")
    assert end == rf"The final answer is \boxed{{{example.target}}}."
    found = calculations(worked)
    # Nothing is calculated that is not checked.
    assert len(found) == worked.count("=") >= 2
    for calculation, result in found:
        assert value(calculation) == Fraction(result.replace("$", "")), calculation
    assert Fraction(found[-1][1].replace("$", "")) == Fraction(example.target), "the last step is the answer"
    assert 2 <= len(re.findall(r"[.?!](?:\s|$)", worked)) <= 4
    assert is_right(example.reply, example.target, "number")
    assert not is_right(example.reply, str(int(example.target) + 1), "number")


def test_solutions_are_problems_of_many_topics_and_answers() -> None:
    require_solutions(PROBLEMS, SOURCE)
    assert purpose_of(SOURCE) == "utility"
    assert len(PROBLEMS) == 100
    assert all(problem.scoring == "number" for problem in PROBLEMS)
    assert all(problem.user_text == f"{REASONING_INSTRUCTION}\n{problem.prompt}" for problem in PROBLEMS)
    topics = [problem.group for problem in PROBLEMS]
    assert {topics.count(topic) for topic in topics} == {10}
    # No answer is worth guessing.
    answers = [problem.target for problem in PROBLEMS]
    assert max(map(answers.count, answers)) <= 6
    assert len(set(answers)) >= 50
