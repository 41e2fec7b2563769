"""Outcomes of replies by a judge, which sees them after all have been generated and stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from castune.artifacts import EvalResult
from castune.core.judges import judge as judge_named
from castune.evaluate.metrics import suite_result

Sample = dict[str, Any]


def judged(samples: Sequence[Mapping[str, Any]], name: str) -> list[Sample]:
    """The samples of a suite with the judge's outcomes; those of questions and problems stay what they are."""
    if not _is_judged(samples):
        return [dict(sample) for sample in samples]
    verdicts = judge_named(name)([s["prompt"] for s in samples], [s["reply"] for s in samples])
    return [{**sample, "outcome": verdict} for sample, verdict in zip(samples, verdicts, strict=True)]


def judge_of(samples: Sequence[Mapping[str, Any]], name: str) -> str:
    """Who decides the outcomes of a suite's samples: the judge, or the way answers are compared."""
    first = samples[0]
    if _is_judged(samples):
        return name
    if "choice_scores" in first:
        return "argmax"
    return "stated letter" if "choices" in first else "final answer"


def judge_again(result: EvalResult, name: str) -> EvalResult:
    """An evaluation with the outcomes of another judge; nothing is generated."""
    samples: list[Sample] = []
    suites = []
    for suite in result.suites:
        of_suite = judged(result.samples_of(suite.suite), name)
        suites.append(
            suite_result(
                of_suite,
                judge=judge_of(of_suite, name),
                max_new_tokens=suite.max_new_tokens,
                data_hash=suite.data_hash,
                seconds=suite.seconds,
            )
        )
        samples += of_suite
    return replace(result, suites=tuple(suites), samples=tuple(samples), settings={**result.settings, "judge": name})


def _is_judged(samples: Sequence[Mapping[str, Any]]) -> bool:
    return samples[0]["purpose"] in ("safety", "over-refusal")
