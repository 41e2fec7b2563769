"""What a stored reply to a question or problem comes to: its answer, whether that is right, and if not, why. Pure."""

from __future__ import annotations

import re
from typing import cast

from castune.artifacts.samples import LetterSample, ProblemSample, is_letter
from castune.core.answer_letters import stated_letter
from castune.core.answers import final_answer, is_right, without_cut_sentence
from castune.data.example import LETTERS
from castune.data.said import said
from castune.evaluation.failures import failure, is_direct


def read(sample: LetterSample | ProblemSample) -> LetterSample | ProblemSample:
    """The sample with `found`, `outcome` and `failure` (and `direct`, of a problem), from its reply alone.

    A refusal, a reply that was cut off or has no answer that can be read is wrong; only a reply that is not there is
    unscored (None).
    """
    found = _letter(sample) if is_letter(sample) else _problem(cast(ProblemSample, sample))
    is_missing = sample.get("missing", False)
    found["outcome"] = None if is_missing else found["outcome"]
    found["failure"] = None if is_missing else failure(found)
    return found


def _letter(sample: LetterSample) -> LetterSample:
    found = stated_letter(said(sample["reply"], in_thought=sample.get("in_thought")), len(sample["choices"]))
    return {**sample, "found": found, "outcome": found == LETTERS[sample["answer"] or 0]}


def _problem(sample: ProblemSample) -> ProblemSample:
    answer = said(sample["reply"], in_thought=sample.get("in_thought"))
    scoring = sample.get("scoring") or _scoring_of(sample["target"])
    if not sample["finished"]:
        answer = without_cut_sentence(answer)
    return {
        **sample,
        "found": final_answer(answer, scoring),
        "outcome": is_right(answer, sample["target"], scoring),
        "direct": sample["finished"] and not sample.get("missing") and is_direct(answer),
    }


def _scoring_of(target: str) -> str:
    """How a problem was scored, of a sample from before that was kept."""
    return "number" if re.fullmatch(r"[-−]?[\d,]+(?:\.\d+)?", target) else "boxed"
