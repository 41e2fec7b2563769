"""The arms of a study where they are equally safe: their costs, the primary contrast, what each training costs. Pure.

Arms are compared over the seeds that they have in common, each training at several strengths of its adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from castune.config import StudyConfig, method_suffix
from castune.purposes import COSTS
from castune.stats.distributions import Z
from castune.stats.equal_safety import ArmCost, common_target, equal_safety
from castune.stats.safety_costs import SafetyCosts
from castune.steps.equal_safety import AtStrengths, cost_curves, safety_costs
from castune.study.primary import PrimaryFinding, primary_finding
from castune.study.trials import Measured, Results, Trial, common_seeds

# Of a single training's bootstrap, which gives a standard error alone: it is then known to 4 %.
_DRAWS = 400


def costs_by_method(results: Results, study: StudyConfig, reference: str) -> dict[str, SafetyCosts]:
    """Costs of the arms of every method at one safety, the reference first, over the seeds that all of them have."""
    found: dict[str, SafetyCosts] = {}
    for method in study.methods:
        suffix = method_suffix(method)
        arms = sorted(study.arms, key=lambda arm: arm != reference)
        costs = None
        if results.base is not None:
            costs = safety_costs(results.base, _at_strengths(results, study, [f"{arm}{suffix}" for arm in arms]))
        if costs is not None:
            found[method] = costs
    return found


def primary(results: Results, study: StudyConfig) -> PrimaryFinding | None:
    """The comparison that the study is made to decide, over the seeds of its two arms."""
    if study.primary is None or results.base is None:
        return None
    return primary_finding(study.primary, results.base, _at_strengths(results, study, study.primary.arms))


def with_costs(results: Results, target: float | None) -> Results:
    """The results, with what every training of the main map costs at one safety (`Trial.at_safety`)."""
    if results.base is None or target is None:
        return results
    return replace(results, trials=tuple(_with_cost(trial, results.base, target) for trial in results.trials))


def at_common_safety(trials: Sequence[Trial], base: Measured | None) -> list[Trial]:
    """Trainings with what each costs at the safety that all their arms reach; undefined where one gains none.

    Buckets of an eighth of the heads do not reach what arms of a quarter do, and have a common safety of their own.
    """
    trials = [replace(trial, at_safety={}) for trial in trials]
    arms = {arm: [_strengths_of(t) for t in trials if t.arm == arm] for arm in dict.fromkeys(t.arm for t in trials)}
    if base is None or not all(trial.strengths for trial in trials):
        return trials
    found = cost_curves(base, arms)
    if found is None:
        return trials
    curves = next(iter(found[1].values()))
    target = common_target(curves) if curves.keys() == arms.keys() else None
    if target is None:
        purposes = [cost.purpose for cost in COSTS.values() if cost.at_safety and cost.purpose in found[1]]
        return [replace(trial, at_safety=dict.fromkeys(purposes, (None, None))) for trial in trials]
    return [_with_cost(trial, base, target) for trial in trials]


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


def _at_strengths(results: Results, study: StudyConfig, arms: Iterable[str]) -> dict[str, Sequence[AtStrengths]]:
    """Of every arm that was measured at several strengths its trainings, of the seeds that all such arms have."""
    trials = {arm: {t.seed: t for t in results.of(arm) if t.strengths} for arm in arms}
    trials = {arm: by_seed for arm, by_seed in trials.items() if by_seed}
    common = common_seeds([*by_seed.values()] for by_seed in trials.values())
    seeds = [seed for seed in study.main_seeds if seed in common]
    return {arm: [_strengths_of(by_seed[seed]) for seed in seeds] for arm, by_seed in trials.items()}


def _strengths_of(trial: Trial) -> AtStrengths:
    return {**trial.strengths, 1.0: trial.measured}
