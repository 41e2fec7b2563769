"""What trainings cost, in every way that was measured: ratios, points of accuracy, nats. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from castune.purposes import COSTS
from castune.study.trials import Measured, Trial

# A cost and its standard error over examples; None where it is undefined, or not known.
Valued = tuple[float | None, float | None]


def measured_costs(base: Measured | None, trials: Sequence[Trial] = ()) -> list[str]:
    """The costs that suites were measured for, of `purposes.COSTS`; at equal safety, that these trials have."""
    if base is None:
        return []
    at_safety = {purpose for trial in trials for purpose in trial.at_safety}
    return [
        name
        for name, cost in COSTS.items()
        if _suites(base, name)
        and (not cost.is_ratio or base.suites_of("safety"))
        and (not cost.at_safety or cost.purpose in at_safety)
    ]


def loss(after: Measured, before: Measured, cost: str) -> Valued:
    """What was lost, in points or nats: the unweighted mean over suites; its standard error is paired by example.

    Args:
        after: a trained arm.
        before: the base model.
        cost: which of `purposes.COSTS`; of a ratio its loss alone.
    """
    value, error = _change(after, before, _suites(before, cost))
    about = COSTS[cost]
    scale = about.unit.scale
    return (
        None if value is None else about.sign * scale * value,
        None if error is None else scale * error,
    )


def costs_of(trials: Sequence[Trial], base: Measured | None, cost: str) -> list[Valued]:
    """What the trainings of one arm cost, each with its standard error over examples; None where it is undefined.

    A ratio divides by a gain in safety that a single training may hardly have, so an arm has one: that of its mean
    rates, as in Table 7. Its trainings have the ratio's linear approximation there; their mean is the arm's ratio, and
    their spread its noise. What is no ratio is linear, and is that of each training. A training of which a suite has
    nothing scored is not among them (`why_undefined`).

    Args:
        trials: of one arm.
        base: the base model.
        cost: one of `purposes.COSTS`.
    """
    nothing: list[Valued] = [(None, None)] * len(trials)
    if base is None:
        return nothing
    if COSTS[cost].at_safety:
        return [trial.at_safety.get(COSTS[cost].purpose, (None, None)) for trial in trials]
    losses = [loss(trial.measured, base, cost) for trial in trials]
    if not COSTS[cost].is_ratio:
        return losses
    scale = COSTS[cost].unit.scale
    gains = [_change(trial.measured, base, base.suites_of("safety")) for trial in trials]
    scored = [
        (loss_of_one[0] / scale, gain_of_one[0])
        for loss_of_one, gain_of_one in zip(losses, gains, strict=True)
        if loss_of_one[0] is not None and gain_of_one[0] is not None
    ]
    lost, gained = (sum(values) / len(scored) for values in zip(*scored, strict=True)) if scored else (0.0, 0.0)
    if gained <= 0:
        return nothing
    ratio = max(0.0, lost / gained)
    found: list[Valued] = []
    for (one, loss_error), (gain, gain_error) in zip(losses, gains, strict=True):
        if one is None or gain is None:
            found.append((None, None))
            continue
        value = ratio + ((one / scale - lost) - ratio * (gain - gained)) / gained
        known = loss_error is not None and gain_error is not None
        error = math.hypot((loss_error or 0.0) / scale, ratio * (gain_error or 0.0)) / gained if known else None
        found.append((value, error))
    return found


def why_undefined(trial: Trial, base: Measured, cost: str) -> str:
    """Why a training has no such cost, within a sentence.

    Args:
        trial: one that `costs_of` gives None for.
        base: the base model.
        cost: one of `purposes.COSTS`.
    """
    about = COSTS[cost]
    if about.at_safety:
        if about.purpose in trial.at_safety:
            return "the common safety was not reached"
        return "a suite has nothing scored at a strength" if trial.strengths else "not every strength was measured"
    needed = [_suites(base, cost), *([base.suites_of("safety")] if about.is_ratio else [])]
    if any(_change(trial.measured, base, suites)[0] is None for suites in needed):
        return "a suite has nothing scored"
    return "safety did not rise"


def cost_alone(trial: Trial, base: Measured | None, cost: str) -> float | None:
    """What one training cost, whatever the other seeds of its arm say."""
    if COSTS[cost].is_ratio:
        ratio = trial.cost_ratios.get(cost)
        return None if ratio is None else ratio.value
    return costs_of([trial], base, cost)[0][0]


def _suites(base: Measured, cost: str) -> list[str]:
    about = COSTS[cost]
    return [suite for suite in base.suites_of(about.purpose) if about.suite in (None, suite)]


def _change(after: Measured, before: Measured, suites: Sequence[str]) -> Valued:
    """Mean change of the outcomes, unweighted over suites, and its standard error, both paired by example."""
    means, variances = [], []
    for suite in suites:
        pairs = [
            (was, after.outcomes[suite][example])
            for example, was in before.outcomes[suite].items()
            if example in after.outcomes.get(suite, {})
        ]
        changes = np.array([now - was for was, now in pairs if was is not None and now is not None])
        if not len(changes):
            return None, None
        means.append(float(changes.mean()))
        variances.append(float(changes.var(ddof=1)) / len(changes) if len(changes) > 1 else math.nan)
    if not means:
        return None, None
    variance = sum(variances) / len(variances) ** 2
    return sum(means) / len(means), None if math.isnan(variance) else math.sqrt(variance)
