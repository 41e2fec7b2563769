"""What a stored reply to a question or problem comes to: its answer, whether that is right, and if not, why. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from castune.core.answers import final_answer, is_right, stated_letter, without_cut_sentence
from castune.data.example import LETTERS
from castune.data.said import said
from castune.evaluation.failures import failure, is_direct

Sample = dict[str, Any]


def is_read(sample: Mapping[str, Any]) -> bool:
    """Whether the outcome of a sample is read from a reply: an answer in words to a question or problem."""
    return "reply" in sample and ("target" in sample or "choices" in sample)


def read(sample: Mapping[str, Any]) -> Sample:
    """The sample with `found`, `outcome` and `failure` (and `direct`, of a problem), from its reply alone.

    A refusal, a reply that was cut off or has no answer that can be read is wrong; only a reply that is not there is
    unscored (None).

    Args:
        sample: `reply`, `finished`; of a question `choices` and `answer`, of a problem `target` and `scoring`;
            `missing` where no reply came, `in_thought` as in `said`.
    """
    answer = said(sample["reply"], in_thought=sample.get("in_thought"))
    is_missing = bool(sample.get("missing"))
    if "choices" in sample:
        found = stated_letter(answer, len(sample["choices"]))
        right = found == LETTERS[sample["answer"] or 0]
        rest: Sample = {}
    else:
        scoring = sample.get("scoring") or _scoring_of(sample["target"])
        if not sample["finished"]:
            answer = without_cut_sentence(answer)
        found = final_answer(answer, scoring)
        right = is_right(answer, sample["target"], scoring)
        rest = {"direct": not is_missing and bool(sample["finished"]) and is_direct(answer)}
    outcome = None if is_missing else right
    result: Sample = {**sample, "found": found, "outcome": outcome, **rest}
    return {**result, "failure": None if is_missing else failure(result)}


def _scoring_of(target: str) -> str:
    """How a problem was scored, of a sample from before that was kept."""
    return "number" if re.fullmatch(r"[-−]?[\d,]+(?:\.\d+)?", target) else "boxed"
