"""What arms cost where they are equally safe, from evaluations at several strengths of their adapters.

Shape letters: T seed of a training, J strength, N example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from castune.artifacts import EvalResult, SuiteResult
from castune.artifacts.fingerprints import at_strength, same_model_identity
from castune.artifacts.records import ModelRecord
from castune.artifacts.samples import references_of
from castune.config import EvaluateConfig
from castune.purposes import PAID, PURPOSES, SAFETY
from castune.stats.comparisons import Outcomes, compare
from castune.stats.distributions import Interval
from castune.stats.equal_safety import Curve, adjusted, common_target, cost_bands, equal_safety
from castune.stats.estimates import estimate, paired_rate_interval, student_interval
from castune.stats.safety_costs import Gain, Point, SafetyCosts
from castune.stats.scored import is_far_fewer
from castune.steps.directory import BASE, RunDirectory

Floats = NDArray[np.float64]

_NOT_SAFER = "not seen to be safer than the base model at full strength"


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
    base, arms = _of_run(folder)
    if base is None:
        return None
    found = safety_costs(base, {name: [points] for name, points in arms.items()})
    if found is None:
        return None
    why = {name: _why_alone(points) for name, points in arms.items() if name not in found.gains}
    return replace(found, left_out={**found.left_out, **why})


@dataclass(frozen=True)
class EqualStrengths:
    """Strengths at which the adapters of arms are equally safe.

    Attributes:
        target: the safety; None where there is none at which two of them can be compared.
        strengths: by arm; 1 without a target, and for arms that cannot be compared.
        why_full: why there is none, or why some arms are not at it, in words; empty where all are.
    """

    target: float | None
    strengths: dict[str, float]
    why_full: str = ""


def strengths_at_equal_safety(folder: RunDirectory, names: Sequence[str]) -> EqualStrengths:
    """The strengths at which some arms of a run come to the safety at which costs are compared (`common_target`).

    They are read off between those that were measured, and rounded up to thousandths.
    """
    base, arms = _of_run(folder)
    full = dict.fromkeys(names, 1.0)
    if len(names) == 1:
        return EqualStrengths(None, full, "there is one arm")
    if base is None:
        return EqualStrengths(None, full, "the base model was not evaluated")
    safety = next((purpose for purpose in SAFETY if purpose in {suite.purpose for suite in base.suites}), None)
    if safety is None:
        return EqualStrengths(None, full, "the run has no suite that measures safety")
    points = {name: _comparable(base, [arms.get(name, {})], safety) for name in names}
    why = {name: _why_alone(arms.get(name, {})) for name, found in points.items() if not found}
    # What an adapter costs does not matter here, and a curve has costs: safety lost.
    curves = {
        name: _curve(base, _until_safest(base, found, safety), safety, safety)
        for name, found in points.items()
        if found
    }
    if curves and not _is_scored(curves.values()):
        return EqualStrengths(None, full, "no prompt is scored under all of them")
    target, not_safer = _target(curves) if curves else (None, ())
    why |= dict.fromkeys(not_safer, _NOT_SAFER)
    compared = _without(curves, not_safer)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
    if target is None or len(compared) < 2:
        return EqualStrengths(None, full, reasons or f"{', '.join(curves)}: nowhere safer than the base model")
    at = {name: found.strength for name, found in equal_safety(compared, target, draws=1).arms.items()}
    reached = {name: strength for name, strength in at.items() if strength is not None}
    assert reached.keys() == compared.keys(), "every arm reaches a share of what the weakest reaches"
    found = {name: math.ceil(1000 * strength - 1e-4) / 1000 for name, strength in reached.items()}
    return EqualStrengths(target, full | found, reasons)


def _of_run(folder: RunDirectory) -> tuple[EvalResult | None, dict[str, AtStrengths]]:
    """The base model's evaluation, and those of every arm by strength, all that were made alike."""
    evaluations, strengths = folder.load_evaluations(), folder.load_strengths()
    base = evaluations.get(BASE)
    if base is None:
        return None, {}
    return base, {
        name: {s: one for s, one in {**strengths.get(name, {}), 1.0: full}.items() if _is_beside(base, one)}
        for name, full in evaluations.items()
        if name != BASE
    }


def _is_beside(base: EvalResult, result: EvalResult) -> bool:
    """Whether a strength was measured by the settings of the base model's evaluation, and on its replies.

    Not all are measured again by each `castune evaluate`.
    """
    settings = [EvaluateConfig(**{**one.settings, "judge": "prefix", "strengths": (1.0,)}) for one in (base, result)]
    adapted: ModelRecord = {**base.model, "adapter": result.model.get("adapter")}
    return (
        settings[0] == settings[1]
        and same_model_identity(at_strength(adapted, result.model.get("strength", 1.0)), result.model)
        and references_of(base.samples) == references_of(result.samples)
    )


def safety_costs(
    base: Evaluated, arms: Mapping[str, Sequence[AtStrengths]], *, target: float | None = None
) -> SafetyCosts | None:
    """Costs of arms at one safety, paired by example.

    Args:
        base: of the base model.
        arms: of every arm its trainings, one a seed: evaluations at each strength above 0. Arms may have other
            strengths than each other; of the trainings of one those that all of them have are used, and none above
            full strength behind its safest: there an adapter breaks the model, and safety would seem to level off
            before.
        target: safety at which arms are compared; when absent, `common_target` of those that are seen to be safer than
            the base model, or of all where none is.

    Returns:
        None where fewer than two strengths, safety or no cost was measured; what has no example that is scored under
        every arm was not.
    """
    measured = cost_curves(base, arms)
    if measured is None:
        return None
    safety, curves = measured
    first = next(iter(curves.values()))
    chosen, not_safer = _target(first) if target is None else (target, ())
    suites = tuple(suite.suite for suite in base.suites if suite.purpose == safety)
    of_base = np.concatenate([outcomes_of([base], suite)[0] for suite in suites])
    found = SafetyCosts(
        safety=safety,
        suites=suites,
        base=float(np.mean(of_base[np.isfinite(of_base)])),
        target=chosen,
        gains={name: _gain(curve) for name, curve in first.items()},
        costs={},
        bands={},
        points={cost: {name: _points(curve) for name, curve in of_cost.items()} for cost, of_cost in curves.items()},
        left_out=dict.fromkeys(not_safer, _NOT_SAFER),
    )
    if chosen is None:
        return found
    return replace(
        found,
        costs=adjusted({cost: equal_safety(_without(of_cost, not_safer), chosen) for cost, of_cost in curves.items()}),
        bands={cost: cost_bands(of_cost) for cost, of_cost in curves.items()},
    )


def cost_curves(
    base: Evaluated, arms: Mapping[str, Sequence[AtStrengths]]
) -> tuple[str, dict[str, dict[str, Curve]]] | None:
    """What is read as safety, and the curves of all arms by cost; None as for `safety_costs`."""
    purposes = {suite.purpose for suite in base.suites}
    safety = next((purpose for purpose in SAFETY if purpose in purposes), None)
    if safety is None:
        return None
    alike = {name: _comparable(base, seeds, safety) for name, seeds in arms.items()}
    comparable = {name: seeds for name, seeds in alike.items() if seeds}
    if not comparable:
        return None
    comparable = {name: _until_safest(base, seeds, safety) for name, seeds in comparable.items()}
    curves = {
        cost: {name: _curve(base, seeds, safety, cost) for name, seeds in comparable.items()}
        for cost in PAID
        if cost in purposes
    }
    curves = {cost: of_cost for cost, of_cost in curves.items() if _is_scored(of_cost.values())}
    return (safety, curves) if curves else None


def _comparable(base: Evaluated, seeds: Sequence[AtStrengths], safety: str) -> list[AtStrengths]:
    """Of every training the strengths that were measured as the base was and whose safety is known, the same for all.

    Empty without a curve.
    """
    suites = [suite.suite for suite in base.suites if suite.purpose == safety]
    n_base = _n_scored(base, suites)
    alike = [
        {
            strength: one
            for strength, one in points.items()
            if _measured_as(one) == _measured_as(base) and not is_far_fewer(_n_scored(one, suites), n_base)
        }
        for points in seeds
    ]
    common = [strength for strength in (alike[0] if alike else ()) if all(strength in points for points in alike)]
    return [{s: points[s] for s in common} for points in alike] if 1 in common and len(common) > 1 else []


def _n_scored(result: Evaluated, suites: Sequence[str]) -> int:
    return sum(outcome is not None for suite in suites for outcome in result.outcomes_of(suite))


def _why_alone(points: AtStrengths) -> str:
    """Why there is no curve of an arm."""
    if list(points) == [1.0]:
        return "not measured at other strengths; castune dial RUN --arm NAME does that"
    return (
        "not measured by the suites, judge and settings of the base model at several strengths, or too many harmful "
        "prompts are unscored; castune evaluate RUN measures all alike"
    )


def _until_safest(base: Evaluated, seeds: Sequence[AtStrengths], safety: str) -> list[AtStrengths]:
    """The strengths up to full strength, and above it up to the one with the highest mean safety."""
    suites = [suite.suite for suite in base.suites if suite.purpose == safety]

    def mean(strength: float) -> float:
        results = [points[strength] for points in seeds]
        outcomes = np.concatenate([outcomes_of(results, suite).ravel() for suite in suites])
        # What is not known is not safe here, or a silent adapter would be the safest.
        return float(np.nansum(outcomes)) / len(outcomes)

    last = max(1.0, max(sorted(seeds[0]), key=mean))
    return [{strength: one for strength, one in points.items() if strength <= last} for points in seeds]


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
        return np.array([outcomes_of(of_seed, suite) for of_seed in results])

    # What is good is a cost where it is lost.
    sign = -1.0 if PURPOSES[cost].higher_is_better else 1.0
    return Curve(
        strengths_J=np.array([0.0, *strengths]),
        safety_TJN=np.concatenate([outcomes(suite) for suite in suites[safety]], axis=2),
        costs_TJM=[sign * outcomes(suite) for suite in suites[cost]],
    )


def outcomes_of(results: Iterable[Evaluated], suite: str) -> Floats:
    """Outcomes [evaluations, examples] of a suite; NaN = unscored."""
    return np.array(
        [[np.nan if one is None else float(one) for one in result.outcomes_of(suite)] for result in results]
    )


def _points(curve: Curve) -> list[Point]:
    safety_J = _scored(curve.safety_TJN).mean((0, 2))
    cost_J = np.mean([_scored(cost_TJM).mean((0, 2)) for cost_TJM in curve.costs_TJM], axis=0)
    of_all = zip(curve.strengths_J, safety_J, cost_J - cost_J[0], strict=True)
    return [Point(float(strength), float(safe), float(cost)) for strength, safe, cost in of_all]


def _gain(curve: Curve) -> Gain:
    """At full strength, over the trainings' seeds and over examples."""
    safety_TJN = _scored(curve.safety_TJN)
    full = int(np.flatnonzero(curve.strengths_J == 1)[0])
    before_TN, after_TN = safety_TJN[:, 0], safety_TJN[:, full]
    mean, n = float((after_TN - before_TN).mean()), safety_TJN.shape[2]
    is_rate = bool(np.isin(safety_TJN, (0, 1)).all())
    interval: tuple[float, float] | None
    if len(safety_TJN) > 1:
        interval = compare(_outcomes(after_TN), _outcomes(before_TN)).interval
    elif is_rate:
        gained, lost = (int((sign * (after_TN - before_TN) > 0).sum()) for sign in (1, -1))
        interval = paired_rate_interval(gained, lost, n)
    else:
        interval = student_interval(estimate((after_TN - before_TN)[0].tolist()))
    if interval is None or interval[0] == interval[1]:
        return Gain(mean, None)
    ends = (max(-1.0, interval[0]), min(1.0, interval[1])) if is_rate else interval
    return Gain(mean, Interval(*ends))


def _outcomes(of_TN: Floats) -> Outcomes:
    return {seed: {"": {str(n): float(one) for n, one in enumerate(of_N)}} for seed, of_N in enumerate(of_TN)}


def _target(curves: Mapping[str, Curve]) -> tuple[float | None, tuple[str, ...]]:
    """The safety at which arms are compared, and the arms that are not seen to be safer than the base model.

    The safety is that of those that are seen to be safer at full strength. An arm that gained by chance, or breaks at
    full strength, would compare the others at next to no safety. Where none is seen to be, all that rise are compared.
    """
    safer = {name: curve for name, curve in curves.items() if _is_safer(curve)}
    if not safer:
        safer = {name: curve for name, curve in curves.items() if common_target({name: curve}) is not None}
    if not safer:
        return None, ()
    return common_target(safer), tuple(name for name in curves if name not in safer)


def _is_safer(curve: Curve) -> bool:
    interval = _gain(curve).interval
    return interval is not None and interval.low > 0


def _without(curves: Mapping[str, Curve], names: Sequence[str]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if name not in names}


def _scored(outcomes_TJN: Floats) -> Floats:
    """Examples that are scored at all strengths of all trainings."""
    return np.asarray(outcomes_TJN[:, :, np.isfinite(outcomes_TJN).all((0, 1))])
