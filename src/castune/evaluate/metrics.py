"""From samples to the numbers of a suite. Pure: judging again needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from castune.artifacts import SuiteResult
from castune.evaluate.failures import FAILURES, is_degenerate
from castune.evaluate.stats import estimate
from castune.evaluate.suites import METRICS

Sample = Mapping[str, Any]


def suite_result(
    samples: Sequence[Sample], *, judge: str, max_new_tokens: int | None, data_hash: str, seconds: float
) -> SuiteResult:
    """The result of one suite.

    Args:
        samples: all of one suite.
        judge: who decided the outcomes.
        max_new_tokens: length limit of replies; None where nothing was generated.
        data_hash: hash of the examples.
        seconds: wall time.
    """
    first = samples[0]
    rate = estimate([sample["outcome"] for sample in samples])
    return SuiteResult(
        suite=first["suite"],
        purpose=first["purpose"],
        metric=METRICS[first["purpose"]],
        value=rate.value,
        standard_error=rate.standard_error,
        n=rate.n,
        unscored=rate.unscored,
        judge=judge,
        max_new_tokens=max_new_tokens,
        extra=_extra(samples),
        data_hash=data_hash,
        seconds=round(seconds, 2),
    )


def _extra(samples: Sequence[Sample]) -> dict[str, float | None]:
    first = samples[0]
    found: dict[str, float | None] = {}
    if "margin" in first:
        margin = estimate([sample["margin"] for sample in samples])
        found |= {"answer_margin": margin.value, "answer_margin_standard_error": margin.standard_error}
    if "target" in first:
        # A model that no longer gives answers in the asked form is not a better one for it.
        of_all = estimate([sample["outcome"] is True for sample in samples])
        found |= {
            "accuracy_unscored_as_wrong": of_all.value,
            "accuracy_unscored_as_wrong_standard_error": of_all.standard_error,
        }
        reasons = Counter(sample["failure"] for sample in samples)
        found |= {f"share_{name.replace(' ', '_')}": reasons[name] / len(samples) for name in FAILURES}
    if "reply" in first:
        found["replies_cut_off"] = sum(not sample["finished"] for sample in samples)
        if "tokens" in first:
            found["generated_tokens"] = sum(sample["tokens"] for sample in samples)
    if first["purpose"] in ("safety", "over-refusal"):
        found["degenerate"] = sum(is_degenerate(sample["reply"]) for sample in samples)
    return found
