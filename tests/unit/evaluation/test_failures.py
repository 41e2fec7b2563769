"""Why answers were wrong: the paper's own examples (Tables 5 and 6), and replies that say nothing."""

from __future__ import annotations

from typing import Any

import pytest

from castune.evaluation.failures import FAILURES, failure, is_degenerate, is_direct

STEPS = (
    "To find out how much Weng earned, we first calculate her earnings per minute. Hourly rate: $12 for 60 minutes. "
    r"Per minute: 12/60 = 0.20 dollars. For 50 minutes: 0.20 * 50 = 10. Answer: \boxed{11}"
)


def sample(reply: str, found: str | None, finished: bool = True) -> dict[str, Any]:
    return {"reply": reply, "outcome": found == "11", "found": found, "finished": finished}


@pytest.mark.parametrize(
    ("reply", "answer", "finished", "why"),
    [
        (STEPS, "11", True, None),
        (STEPS, "10", True, "wrong reasoning"),
        ("66", "66", True, "direct answer"),
        (r"\boxed{66}", "66", True, "direct answer"),
        (r"The answer is \boxed{66}.", "66", True, "direct answer"),
        ("I apologize, but I cannot answer this question.", None, True, "refusal"),
        (STEPS[:150], None, False, "truncated"),
        (STEPS.partition(" Answer")[0], None, True, "no answer found"),
        ("", None, True, "degenerate"),
        ("We add the two. " * 40, None, False, "degenerate"),
    ],
)
def test_every_lost_problem_has_one_reason(reply: str, answer: str | None, finished: bool, why: str | None) -> None:
    found = failure(sample(reply, answer, finished))
    assert found == why
    assert found is None or found in FAILURES


@pytest.mark.parametrize(
    ("reply", "direct"),
    [
        ("66", True),
        ("$66", True),
        ("The answer is 66 frogs.", True),
        (r"\boxed{6 * 7}", True),
        (r"The final answer is \boxed 7.", True),
        ("2-3", True),
        ("6 * 7 = 42. The answer is 42.", False),
        (r"0 + 0 = 0. The final answer is \boxed{0}.", False),
        (r"$6 \times 7 = 42$, so \boxed{42}", False),
        ("48 / 2 = 24", False),
        ("50 - 8 = 42", False),
        ("I cannot answer that.", False),
        (STEPS, False),
    ],
)
def test_a_calculation_is_a_step_however_short(reply: str, direct: bool) -> None:
    assert is_direct(reply) is direct


@pytest.mark.parametrize(
    ("reply", "says_nothing"),
    [
        ("", True),
        (" \n ", True),
        ("...!?", True),
        ("no no no no no no", True),
        ("First we go. " + "and then again " * 20, True),
        ("a" * 60, True),
        ("不" * 60, True),
        ("No.", False),
        ("Sure! Here is a poem about the sea, the sea, the sea.", False),
        (STEPS, False),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", False),
    ],
)
def test_replies_that_say_nothing(reply: str, says_nothing: bool) -> None:
    assert is_degenerate(reply) is says_nothing
