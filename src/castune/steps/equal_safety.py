"""What arms cost where they are equally safe, from evaluations at several strengths of their adapters.

Shape letters: T seed of a training, J strength, N example.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from castune.artifacts import SuiteResult
from castune.purposes import PAID, PURPOSES, SAFETY
from castune.stats.distributions import Interval, student_quantile
from castune.stats.equal_safety import Curve, adjusted, common_target, cost_bands, equal_safety
from castune.stats.safety_costs import Gain, Point, SafetyCosts
from castune.steps.directory import BASE, RunDirectory

Floats = NDArray[np.float64]


class Evaluated(Protocol):
    """What is read of an evaluation: an `EvalResult`, or what is kept of one without its replies."""

    @property
    def suites(self) -> tuple[SuiteResult, ...]:
        """Results of its suites."""

    def outcomes_of(self, suite: str) -> Sequence[float | None]:
        """Outcomes of the examples of a suite, in their order."""


# By strength, 0 is the base model.
AtStrengths = Mapping[float, Evaluated]


def costs_at_equal_safety(folder: RunDirectory) -> SafetyCosts | None:
    """Costs of a run's arms at one safety, where they were evaluated at several strengths."""
    evaluations, strengths = folder.load_evaluations(), folder.load_strengths()
    if BASE not in evaluations:
        return None
    arms = {name: [{**strengths[name], 1.0: evaluations[name]}] for name in evaluations if name in strengths}
    return safety_costs(evaluations[BASE], arms)


def safety_costs(
    base: Evaluated, arms: Mapping[str, Sequence[AtStrengths]], *, target: float | None = None
) -> SafetyCosts | None:
    """Costs of arms at one safety, paired by example.

    Args:
        base: of the base model.
        arms: of every arm its trainings, one a seed: evaluations at each strength above 0, the same for all.
        target: safety at which arms are compared; `common_target` when absent.

    Returns:
        None where fewer than two strengths, safety or no cost was measured; what has no example that is scored under
        every arm was not.
    """
    measured = cost_curves(base, arms)
    if measured is None:
        return None
    safety, curves = measured
    first = next(iter(curves.values()))
    chosen = common_target(first) if target is None else target
    found = SafetyCosts(
        safety=safety,
        target=chosen,
        gains={name: _gain(curve) for name, curve in first.items()},
        costs={},
        bands={},
        points={cost: {name: _points(curve) for name, curve in of_cost.items()} for cost, of_cost in curves.items()},
    )
    if chosen is None:
        return found
    return replace(
        found,
        costs=adjusted({cost: equal_safety(of_cost, chosen) for cost, of_cost in curves.items()}),
        bands={cost: cost_bands(of_cost) for cost, of_cost in curves.items()},
    )


def cost_curves(
    base: Evaluated, arms: Mapping[str, Sequence[AtStrengths]]
) -> tuple[str, dict[str, dict[str, Curve]]] | None:
    """What is read as safety, and the curves of all arms by cost; None as for `safety_costs`."""
    comparable = {name: seeds for name, seeds in arms.items() if _is_comparable(base, seeds)}
    purposes = {suite.purpose for suite in base.suites}
    safety = next((purpose for purpose in SAFETY if purpose in purposes), None)
    if safety is None or not comparable:
        return None
    curves = {
        cost: {name: _curve(base, seeds, safety, cost) for name, seeds in comparable.items()}
        for cost in PAID
        if cost in purposes
    }
    curves = {cost: of_cost for cost, of_cost in curves.items() if _is_scored(of_cost.values())}
    return (safety, curves) if curves else None


def _is_comparable(base: Evaluated, seeds: Sequence[AtStrengths]) -> bool:
    """Whether there is a curve, and every point of it was measured as the base was."""
    if not seeds or any(len(points) < 2 or 1 not in points or points.keys() != seeds[0].keys() for points in seeds):
        return False
    return all(_measured_as(result) == _measured_as(base) for points in seeds for result in points.values())


def _is_scored(curves: Iterable[Curve]) -> bool:
    """Whether the safety, and every suite of the cost, has an example that is scored under all arms."""
    of_arms = [[curve.safety_TJN, *curve.costs_TJM] for curve in curves]
    scored = ([np.isfinite(of_arm[n]).all((0, 1)) for of_arm in of_arms] for n in range(len(of_arms[0])))
    return all(bool(np.all(of_suite, axis=0).any()) for of_suite in scored)


def _measured_as(result: Evaluated) -> list[tuple[object, ...]]:
    return [(suite.suite, suite.data_hash, suite.judge, suite.max_new_tokens) for suite in result.suites]


def _curve(base: Evaluated, seeds: Sequence[AtStrengths], safety: str, cost: str) -> Curve:
    strengths = sorted(seeds[0])
    results = [[base, *(points[strength] for strength in strengths)] for points in seeds]
    suites = {purpose: [s.suite for s in base.suites if s.purpose == purpose] for purpose in (safety, cost)}

    def outcomes(suite: str) -> Floats:
        return np.array([[_outcomes(result, suite) for result in of_seed] for of_seed in results])

    # What is good is a cost where it is lost.
    sign = -1.0 if PURPOSES[cost].higher_is_better else 1.0
    return Curve(
        strengths_J=np.array([0.0, *strengths]),
        safety_TJN=np.concatenate([outcomes(suite) for suite in suites[safety]], axis=2),
        costs_TJM=[sign * outcomes(suite) for suite in suites[cost]],
    )


def _outcomes(result: Evaluated, suite: str) -> list[float]:
    return [np.nan if outcome is None else float(outcome) for outcome in result.outcomes_of(suite)]


def _points(curve: Curve) -> list[Point]:
    safety_J = _scored(curve.safety_TJN).mean((0, 2))
    cost_J = np.mean([_scored(cost_TJM).mean((0, 2)) for cost_TJM in curve.costs_TJM], axis=0)
    of_all = zip(curve.strengths_J, safety_J, cost_J - cost_J[0], strict=True)
    return [Point(float(strength), float(safe), float(cost)) for strength, safe, cost in of_all]


def _gain(curve: Curve) -> Gain:
    """Of the trainings' mean, over examples."""
    safety_TJN = _scored(curve.safety_TJN)
    full = int(np.flatnonzero(curve.strengths_J == 1)[0])
    change_N = (safety_TJN[:, full] - safety_TJN[:, 0]).mean(0)
    mean, n = float(change_N.mean()), len(change_N)
    if n < 2:
        return Gain(mean, None)
    half = student_quantile(n - 1) * float(change_N.std(ddof=1)) / n**0.5
    return Gain(mean, Interval(mean - half, mean + half))


def _scored(outcomes_TJN: Floats) -> Floats:
    """Examples that are scored at all strengths of all trainings."""
    return np.asarray(outcomes_TJN[:, :, np.isfinite(outcomes_TJN).all((0, 1))])
