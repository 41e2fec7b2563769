"""The arms of a study where they are equally safe: their costs, the primary contrast, what each training costs. Pure.

Arms are compared over the seeds that they have in common, each training at several strengths of its adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from castune.config import StudyConfig, method_suffix
from castune.purposes import COSTS
from castune.stats.distributions import Z
from castune.stats.equal_safety import ArmCost, Curve, common_target, equal_safety
from castune.stats.safety_costs import SafetyCosts
from castune.steps.equal_safety import AtStrengths, cost_curves, safety_costs
from castune.study.primary import PrimaryFinding, primary_finding
from castune.study.trials import Measured, Results, Trial, most_comparable

# Of a single training's bootstrap, which gives a standard error alone: it is then known to 4 %.
_DRAWS = 400


def costs_by_method(results: Results, study: StudyConfig, reference: str) -> dict[str, SafetyCosts]:
    """Costs of the arms of every method at one safety, the reference first, over the seeds that they have in common.

    An arm that was not measured at every strength, has no score there, or has too few seeds in common with the others
    (`most_comparable`) is left out, and named in what is found.
    """
    found: dict[str, SafetyCosts] = {}
    for method in study.methods:
        suffix = method_suffix(method)
        arms = [f"{arm}{suffix}" for arm in sorted(study.arms, key=lambda arm: arm != reference)]
        arms = [arm for arm in arms if results.of(arm)]
        measured = _measured(results, arms)
        compared = _at_strengths(measured, study)
        costs = None if results.base is None else safety_costs(results.base, compared)
        if costs is None:
            continue
        why = {arm: _why_apart(results, arm, arm in measured) for arm in arms if arm not in costs.gains}
        found[method] = replace(costs, left_out={**costs.left_out, **why})
    return found


def _why_apart(results: Results, arm: str, is_measured: bool) -> str:
    if not any(trial.strengths for trial in results.of(arm)):
        return "not measured at other strengths; castune study RECIPE does that"
    if not is_measured:
        return "nothing is scored at one of the strengths"
    return "measured at every strength with too few of the training seeds of the others"


def primary(results: Results, study: StudyConfig) -> PrimaryFinding | None:
    """The comparison that the study is made to decide, over the seeds of its two arms."""
    if study.primary is None or results.base is None:
        return None
    return primary_finding(study.primary, results.base, _at_strengths(_measured(results, study.primary.arms), study))


def with_costs(results: Results, target: float | None) -> Results:
    """The results, with what every training of the main map costs at one safety (`Trial.at_safety`)."""
    if results.base is None or target is None:
        return results
    return replace(results, trials=tuple(_with_cost(trial, results.base, target) for trial in results.trials))


def at_common_safety(trials: Sequence[Trial], base: Measured | None) -> list[Trial]:
    """Trainings with what each costs at the safety that all their arms reach that gain any (`Trial.at_safety`).

    Buckets of an eighth of the heads do not reach what arms of a quarter do, and have a common safety of their own.
    One that gains none does not reach it; a training that was not measured at every strength has no cost there.
    """
    trials = [replace(trial, at_safety={}) for trial in trials]
    if base is None:
        return trials
    measured = _scored_as_most(trials, base)
    arms = most_comparable({arm: [t for t in measured if t.arm == arm] for arm in dict.fromkeys(t.arm for t in trials)})
    found = cost_curves(base, {arm: [_strengths_of(trial) for trial in of_arm] for arm, of_arm in arms.items()})
    if found is None:
        return trials
    purposes = [cost.purpose for cost in COSTS.values() if cost.at_safety and cost.purpose in found[1]]
    target = _target(next(iter(found[1].values())))
    if target is None:
        costed = [replace(trial, at_safety=dict.fromkeys(purposes, (None, None))) for trial in measured]
    else:
        costed = [_with_cost(trial, base, target) for trial in measured]
    by_training = {(trial.arm, trial.seed): trial for trial in costed}
    return [by_training.get((trial.arm, trial.seed), trial) for trial in trials]


def _target(curves: Mapping[str, Curve]) -> float | None:
    """The common safety of the arms that gain any; None where none does."""
    gaining = {arm: curve for arm, curve in curves.items() if common_target({arm: curve}) is not None}
    return common_target(gaining) if gaining else None


def _with_cost(trial: Trial, base: Measured, target: float) -> Trial:
    found = cost_curves(base, {trial.arm: [_strengths_of(trial)]}) if trial.strengths else None
    if found is None:
        return trial
    purposes = [cost.purpose for cost in COSTS.values() if cost.at_safety and cost.purpose in found[1]]
    costs = {
        purpose: _valued(equal_safety(found[1][purpose], target, draws=_DRAWS).arms[trial.arm]) for purpose in purposes
    }
    return replace(trial, at_safety=costs)


def _valued(cost: ArmCost) -> tuple[float | None, float | None]:
    """A cost and its standard error over examples, from the width of its interval."""
    ends = cost.interval
    known = cost.value is not None and ends is not None and np.isfinite(ends).all()
    return cost.value, (ends.high - ends.low) / (2 * Z) if known and ends is not None else None


def _measured(results: Results, arms: Iterable[str]) -> dict[str, list[Trial]]:
    """Of every arm that was measured at several strengths the trainings that were, and are scored there."""
    if results.base is None:
        return {}
    trials = _scored_as_most([trial for arm in arms for trial in results.of(arm)], results.base)
    return {arm: [t for t in trials if t.arm == arm] for arm in dict.fromkeys(trial.arm for trial in trials)}


def _scored_as_most(trials: Iterable[Trial], base: Measured) -> list[Trial]:
    """Those with several strengths, without any that lacks a score of what most of them have one of.

    What is compared has a score under all of them: one training without any would leave nothing of the others.
    """
    several = [trial for trial in trials if trial.strengths]
    curves = [cost_curves(base, {trial.arm: [_strengths_of(trial)]}) for trial in several]
    scored = [set() if found is None else set(found[1]) for found in curves]
    counts = Counter(cost for costs in scored for cost in costs)
    usual = {cost for cost, n in counts.items() if 2 * n >= len(several)}
    return [trial for trial, costs in zip(several, scored, strict=True) if costs and usual <= costs]


def _at_strengths(measured: Mapping[str, Sequence[Trial]], study: StudyConfig) -> dict[str, Sequence[AtStrengths]]:
    """The trainings of the arms that can be compared with the first, of the seeds that they have in common."""
    of_arms = most_comparable(measured, reference=next(iter(measured), None))
    by_seed = {arm: {trial.seed: _strengths_of(trial) for trial in trials} for arm, trials in of_arms.items()}
    return {arm: [found[seed] for seed in study.main_seeds if seed in found] for arm, found in by_seed.items()}


def _strengths_of(trial: Trial) -> AtStrengths:
    return {**trial.strengths, 1.0: trial.measured}
