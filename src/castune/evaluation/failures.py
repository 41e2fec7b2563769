"""Why a problem was lost, and replies that say nothing (Appendix C as a measurement). Pure."""

from __future__ import annotations

import re

from castune.artifacts.samples import LetterSample, ProblemSample, is_letter
from castune.core.answer_text import last_boxed
from castune.core.refusals import refuses_by_prefix
from castune.data.said import said

# Why a worked answer is not right, in the order in which they are asked for.
FAILURES = ("refusal", "degenerate", "direct answer", "truncated", "no answer found", "wrong reasoning", "wrong answer")

# A worked answer has more words than this beside its final answer ("The answer is 66." has three).
_DIRECT_WORDS = 12
# Two numbers and what is done with them; a hyphen between digits may be a range.
_CALCULATION = re.compile(r"\d\s*(?:[+*×÷]|\\(?:times|cdot|div)\b|/\s*(?=\S+\s*=)|\s[-−]\s)\s*[($\\]*\d")
# A reply that ends in a unit of at most so many words, repeated so often, over at least this share of it.
_UNIT_WORDS = 40
_REPETITIONS = 4
_REPEATED_SHARE = 0.5


def failure(sample: LetterSample | ProblemSample) -> str | None:
    """Why a sample of a question or problem is not right, one of `FAILURES`; None where it is right.

    `direct answer`: the final number without the steps that lead to it, the paper's reasoning collapse. `truncated`:
    the length limit came first. `no answer found`: it ended without an answer that can be read. `wrong answer`: another
    letter than the right one.
    """
    if sample["outcome"]:
        return None
    reply = said(sample["reply"], in_thought=sample.get("in_thought"))
    if refuses_by_prefix(reply):
        return "refusal"
    if is_degenerate(sample["reply"]):
        return "degenerate"
    is_question = is_letter(sample)
    if not is_question and sample["finished"] and is_direct(reply):
        return "direct answer"
    if sample["found"] is None:
        return "no answer found" if sample["finished"] else "truncated"
    return "wrong answer" if is_question else "wrong reasoning"


def is_direct(reply: str) -> bool:
    """Whether a reply is a final answer without the steps to it: a number or a box, and hardly a word beside.

    A calculation is a step, however short: "6 * 7 = 42. The answer is 42."
    """
    boxed = last_boxed(reply)
    if boxed is None and not re.search(r"\d", reply):
        return False
    # The box alone: its number may stand in a calculation too.
    box = "" if boxed is None else rf"\\(?:boxed|fbox)\s*\{{?\s*{re.escape(boxed)}\s*\}}?|"
    without = re.sub(rf"{box}\\(?:boxed|text|fbox)", " ", reply)
    if _CALCULATION.search(without):
        return False
    return len(re.findall(r"[^\W\d_]{2,}|\d[\d.,]*|[=+*/×÷]", without)) <= _DIRECT_WORDS


def is_degenerate(reply: str) -> bool:
    """Whether a reply says nothing: no letter or digit in it, or half of it one phrase over and over."""
    if not re.search(r"\w", reply):
        return True
    words = reply.split()
    return any(_repeats(words, n) for n in range(1, min(_UNIT_WORDS, len(words) // _REPETITIONS) + 1)) or _stutters(
        reply
    )


def _repeats(words: list[str], n: int) -> bool:
    """Whether the text ends in one phrase of `n` words repeated; its last repetition may be cut off."""
    same = 0
    while same + n < len(words) and words[-1 - same] == words[-1 - same - n]:
        same += 1
    return same >= (_REPETITIONS - 1) * n and same + n >= _REPEATED_SHARE * len(words)


def _stutters(reply: str) -> bool:
    """Text without spaces ("aaaaaa", or a script that has none): the same by characters."""
    tail = re.sub(r"\s+", "", reply)
    return any(_repeats(list(tail), n) for n in range(1, 9)) if len(tail) >= 40 else False
