"""What the scores of a study's maps predict: buckets against their costs, and the same beyond depth, beyond O(h) and
beyond the size of the gradients (Section 5.3, Table 8). Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from castune.artifacts import Unit
from castune.config import StudyConfig
from castune.purposes import COSTS
from castune.stats.comparisons import holm
from castune.stats.correlations import PartialCorrelation, partial_correlation
from castune.stats.nulls import order_p
from castune.stats.validity import Point, Validity, arm_means, predictive_validity
from castune.study.equal_safety import at_common_safety
from castune.study.realised_costs import costs_of, measured_costs, why_undefined
from castune.study.trials import REFERENCE, Measured, Results, Trial, over_common_seeds, plain_trials
from castune.study.verdicts import verdict

# Arms are told apart from this share of common heads down.
_ALIKE = 0.9
SYMBOLS = {"conflict": "C", "gradient": "O", "sensitivity": "S", "magnitude": "O·|g|²"}
# MMLU is one of the utility suites, and its ratio much like that of all of them.
_LEFT_OUT = "mmlu_cr"
# What a score must tell more than, and what it is called.
CONTROLS = {"depth": "layer", "gradient": "O(h)", "gradient_size": "size of the gradients"}


@dataclass(frozen=True)
class ScoreValidity:
    """A score's buckets against their costs."""

    score: str
    buckets: int
    cost: str
    found: Validity
    order_p: float | None
    points: tuple[Point, ...]
    words: str


@dataclass(frozen=True)
class Control:
    """Score against cost over the arms of one size (of which there are most), with something else of their heads held
    constant: their layer, their O(h), or the size of their gradients (`CONTROLS`)."""

    score: str
    cost: str
    held: str
    found: PartialCorrelation


def _points(trials: Sequence[Trial], base: Measured | None, score: str, cost: str, held: str = "depth") -> list[Point]:
    """The trainings of several arms as points."""
    points = []
    for arm in dict.fromkeys(trial.arm for trial in trials):
        of_arm = [trial for trial in trials if trial.arm == arm]
        for trial, (value, error) in zip(of_arm, costs_of(of_arm, base, cost), strict=True):
            control = _held(trial, held)
            assert control is not None
            points.append(
                Point(arm=arm, seed=trial.seed, score=trial.scores[score], control=control, cost=value, cost_se=error)
            )
    return points


def validities(results: Results, study: StudyConfig) -> list[ScoreValidity]:
    """Every score against every cost over its buckets, Holm over all."""
    wanted = []
    for buckets in study.buckets:
        for score in study.scores:
            arms = [study.bucket(number, buckets, score) for number in range(1, buckets + 1)]
            trials = over_common_seeds([trial for arm in arms for trial in results.of(arm)])
            trials = at_common_safety(trials, results.base)
            costs = measured_costs(results.base, trials)
            wanted += [
                (score, buckets, cost, trials, _points(trials, results.base, score, cost)) for cost in costs if trials
            ]
    tested = [predictive_validity(points) for *_, points in wanted]
    adjusted = holm([found.of_means.pearson_p for found in tested])
    made = []
    for (score, buckets, cost, trials, points), found, p in zip(wanted, tested, adjusted, strict=True):
        words = verdict(
            found,
            score=SYMBOLS[score],
            cost=COSTS[cost].phrase,
            why_undefined=_reasons(trials, points, results.base, cost),
            p_adjusted=p,
            n_comparisons=len(tested),
        )
        means = arm_means(points)
        order = order_p(means.score_A.tolist(), means.cost_A.tolist())
        made.append(ScoreValidity(score, buckets, cost, found, order, tuple(points), f"{buckets} buckets: {words}"))
    return made


def _reasons(trials: Sequence[Trial], points: Sequence[Point], base: Measured | None, cost: str) -> dict[str, int]:
    """Why costs of trainings are undefined, and of how many."""
    undefined = {(point.arm, point.seed) for point in points if point.cost is None}
    of_trials = [trial for trial in trials if (trial.arm, trial.seed) in undefined]
    return Counter(why_undefined(trial, base, cost) for trial in of_trials) if base is not None else {}


def controlled_costs(results: Results) -> list[str]:
    """Costs that are looked at beyond the buckets."""
    return [cost for cost in measured_costs(results.base, results.trials) if cost != _LEFT_OUT]


def controls(results: Results, study: StudyConfig) -> list[Control]:
    """Every score against every cost over arms of one size, beyond each of `CONTROLS`."""
    arms = at_common_safety(_of_one_size(results), results.base)
    found = []
    # A study's map may be older than a score.
    for score in (one for one in study.scores if all(one in trial.scores for trial in arms)):
        for cost in (one for one in measured_costs(results.base, arms) if one != _LEFT_OUT):
            for held in CONTROLS:
                values = [_held(trial, held) for trial in arms]
                if held == score or None in values:
                    continue
                means = arm_means(_points(arms, results.base, score, cost, held))
                partial = partial_correlation(means.score_A.tolist(), means.cost_A.tolist(), means.control_A.tolist())
                found.append(Control(score, cost, held, partial))
    return found


def _of_one_size(results: Results) -> list[Trial]:
    """Trainings of the arms of one number of heads: of the largest such group, of the reference's where two are alike.

    Arms of other sizes cost more or less for their size alone.
    """
    plain = _unlike(plain_trials(results))
    sizes = {len(trial.selection.units) for trial in plain}
    usual = {len(trial.selection.units) for trial in results.of(REFERENCE)}
    # Buckets differ by a head where the number of heads is no multiple.
    groups = {size: [t for t in plain if 0 <= len(t.selection.units) - size <= 1] for size in sizes}

    def rank(size: int) -> tuple[int, bool]:
        return len({trial.arm for trial in groups[size]}), bool(usual & {size, size + 1})

    return over_common_seeds(groups[max(sizes, key=rank)]) if sizes else []


def _held(trial: Trial, what: str) -> float | None:
    if what == "depth":
        return trial.depth
    return trial.gradient_size if what == "gradient_size" else trial.scores[what]


def _unlike(trials: Sequence[Trial]) -> list[Trial]:
    """Without arms that have nearly the heads of one before, which add no evidence: safe and the last bucket."""
    kept: dict[str, set[Unit]] = {}
    for trial in trials:
        units = set(trial.selection.units)
        if trial.arm not in kept and all(len(units & other) <= _ALIKE * len(units | other) for other in kept.values()):
            kept[trial.arm] = units
    return [trial for trial in trials if trial.arm in kept]
