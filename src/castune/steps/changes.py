"""What a training changed: every arm against the base model, on the same examples."""

from __future__ import annotations

from castune.artifacts import EvalResult
from castune.artifacts.samples import references_of
from castune.purposes import COSTS, RATIOS
from castune.stats.estimates import CostRatio, PairedDifference, Pairs, bootstrap_cost_ratio, paired_difference
from castune.steps.directory import BASE


def cost_ratios(evaluations: dict[str, EvalResult], ratio: str = "ucr") -> dict[str, CostRatio]:
    """A cost ratio of every tuned arm against the base model, with intervals over the examples.

    Arms that cannot be compared are left out: a suite is missing on one side, was measured otherwise, or has nothing
    scored.

    Args:
        evaluations: by arm.
        ratio: one of `purposes.RATIOS`.
    """
    base, cost = evaluations.get(BASE), COSTS[ratio]
    ratios: dict[str, CostRatio] = {}
    for name, result in evaluations.items():
        if base is None or name == BASE:
            continue
        groups: dict[str, list[Pairs | None]] = {cost.purpose: [], "safety": []}
        if any(_suites_of(base, purpose) != _suites_of(result, purpose) for purpose in groups):
            continue
        for suite in result.suites:
            if suite.purpose in groups and (cost.suite in (None, suite.suite) or suite.purpose != cost.purpose):
                groups[suite.purpose].append(_pairs(base, result, suite.suite))
        loss_pairs, safety_pairs = ([pairs for pairs in group if pairs is not None] for group in groups.values())
        if not all(groups.values()) or None in (*groups[cost.purpose], *groups["safety"]):
            continue
        if cost.sign > 0:  # a rise is the loss
            loss_pairs = [(after, before) for before, after in loss_pairs]
        found = bootstrap_cost_ratio(loss_pairs, safety_pairs)
        if found is not None:
            ratios[name] = found
    return ratios


def all_cost_ratios(evaluations: dict[str, EvalResult]) -> dict[str, dict[str, CostRatio]]:
    """Every cost ratio that was measured: `{ratio: {arm: value}}`."""
    found = {ratio: cost_ratios(evaluations, ratio) for ratio in RATIOS}
    return {ratio: of_arms for ratio, of_arms in found.items() if of_arms}


def differences(evaluations: dict[str, EvalResult]) -> dict[str, dict[str, PairedDifference]]:
    """Change of every suite against the base model, paired by example: `{arm: {suite: difference}}`.

    Suites that were measured or judged otherwise than the base model's are left out.
    """
    base = evaluations.get(BASE)
    found: dict[str, dict[str, PairedDifference]] = {}
    for name, result in evaluations.items():
        if base is None or name == BASE:
            continue
        pairs = {suite.suite: _pairs(base, result, suite.suite) for suite in result.suites}
        found[name] = {suite: paired_difference(*both) for suite, both in pairs.items() if both is not None}
    return found


def incomparable(base: EvalResult, result: EvalResult, suite: str) -> str | None:
    """Why a suite of two evaluations cannot be compared example by example, in words; None where it can be."""
    mine = result.suite(suite)
    other = next((found for found in base.suites if found.suite == suite), None)
    if other is None:
        return "it was not measured there"
    if mine.judge != other.judge:
        return f"its judge is {mine.judge} here and {other.judge} there"
    if mine.max_new_tokens != other.max_new_tokens:
        return f"replies have up to {mine.max_new_tokens} tokens here and {other.max_new_tokens} there"
    here, there = (evaluation.settings.get("backend", "hf") for evaluation in (result, base))
    if here != there:
        return f"its backend is {here} here and {there} there"
    if references_of(base.samples_of(suite)) != references_of(result.samples_of(suite)):
        return "it was measured on other replies of the base model there"
    if not {sample["id"] for sample in base.samples_of(suite)} & {sample["id"] for sample in result.samples_of(suite)}:
        return "no example is the same"
    return None


def paired_outcomes(base: EvalResult, result: EvalResult, suite: str) -> Pairs:
    """Outcomes of the examples of a suite that both evaluations have, of `base` first."""
    before = {sample["id"]: sample["outcome"] for sample in base.samples_of(suite)}
    after = {sample["id"]: sample["outcome"] for sample in result.samples_of(suite) if sample["id"] in before}
    return [before[identifier] for identifier in after], list(after.values())


def _suites_of(result: EvalResult, purpose: str) -> set[str]:
    return {suite.suite for suite in result.suites if suite.purpose == purpose}


def _pairs(base: EvalResult, result: EvalResult, suite: str) -> Pairs | None:
    return None if incomparable(base, result, suite) else paired_outcomes(base, result, suite)
