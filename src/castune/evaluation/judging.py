"""Outcomes of replies by a judge, which sees them after all have been generated and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from castune.artifacts import EvalResult
from castune.artifacts.rules import RULES
from castune.artifacts.samples import ReplySample, Sample, is_choice, is_letter, is_number, is_problem
from castune.data.said import said
from castune.evaluation.judges import judge
from castune.evaluation.metrics import suite_result
from castune.evaluation.reading import read
from castune.evaluation.verdict import Judge

# What a judge leaves in a sample, and takes out again when another one judges.
_OF_A_JUDGE = ("harmful", "verdicts")


def judged(samples: Sequence[Sample], by: Judge) -> list[Sample]:
    """The samples of a suite with the judge's outcomes; answers in words are read again, scores stay what they are."""
    if not _is_judged(samples):
        return [_read(sample) for sample in samples]
    bare = [_bare(cast(ReplySample, sample)) for sample in samples]
    found: list[Sample] = []
    verdicts = by.verdicts(
        [s["prompt"] for s in bare], [said(s["reply"], in_thought=s.get("in_thought")) for s in bare]
    )
    for sample, verdict in zip(bare, verdicts, strict=True):
        sample["outcome"] = verdict.refuses
        if by.tells_harm:
            sample["harmful"] = verdict.harmful
        if verdict.members:
            sample["verdicts"] = dict(verdict.members)
        found.append(sample)
    return found


def judge_of(samples: Sequence[Sample], by: Judge) -> str:
    """Who decides the outcomes of a suite's samples: the judge, or the way answers are compared."""
    first = samples[0]
    if _is_judged(samples):
        return by.signature
    if is_choice(first):
        return "argmax"
    if is_number(first):
        return "log-likelihood"
    return "stated letter" if is_letter(first) else "final answer"


def judge_again(result: EvalResult, by: str | Judge) -> EvalResult:
    """An evaluation with the outcomes of another judge; nothing is generated."""
    by = judge(by) if isinstance(by, str) else by
    samples: list[Sample] = []
    suites = []
    for suite in result.suites:
        of_suite = judged(result.samples_of(suite.suite), by)
        suites.append(
            suite_result(
                of_suite,
                judge=judge_of(of_suite, by),
                max_new_tokens=suite.max_new_tokens,
                data_hash=suite.data_hash,
                seconds=suite.seconds,
            )
        )
        samples += of_suite
    return replace(
        result,
        suites=tuple(suites),
        samples=tuple(samples),
        settings={**result.settings, "judge": by.name},
        provenance={**result.provenance, "rules": RULES},
    )


def _is_judged(samples: Sequence[Sample]) -> bool:
    return samples[0]["purpose"] in ("safety", "over-refusal")


def _read(sample: Sample) -> Sample:
    if is_letter(sample):
        return read(sample)
    return read(sample) if is_problem(sample) else sample.copy()


def _bare(sample: ReplySample) -> ReplySample:
    """A copy without what another judge left."""
    return cast(ReplySample, {key: value for key, value in sample.items() if key not in _OF_A_JUDGE})
