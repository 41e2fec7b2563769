"""What the trials of a study show: comparisons of arms, scores against costs, nulls, maps and budgets. Pure.

Every number here comes with what it was computed from; every sentence follows from its interval (`verdicts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from castune.artifacts import ConflictMap
from castune.config import StudyConfig, method_suffix
from castune.select import SCORE_COLUMNS
from castune.study.budget import Check, CostCurve, check_against, cost_curve, predicted_cost, standard_errors
from castune.study.comparisons import Comparison, Outcomes, compare_with, holm
from castune.study.correlations import Agreement, PartialCorrelation, map_agreement, partial_correlation
from castune.study.nulls import NullPosition, OrderNull, null_position, order_null
from castune.study.trials import PURPOSES, Measured, Results, Trial, utility_lost
from castune.study.validity import Point, Validity, arm_means, predictive_validity
from castune.study.verdicts import comparison_verdict, null_verdict, verdict

# The arm that every other one is compared with: what the method recommends.
REFERENCE = "safe"
# What training an arm may cost, and in what words.
COSTS = {"ucr": "utility cost ratio", "mmlu_cr": "MMLU cost ratio", "utility_lost": "utility lost"}
SYMBOLS = {"conflict": "C", "gradient": "O", "sensitivity": "S"}
_METRICS = {
    "utility": "utility accuracy",
    "safety": "the refusal rate on harmful prompts",
    "over-refusal": "the refusal rate on harmless prompts",
}


@dataclass(frozen=True)
class ArmComparison:
    """An arm against the safe zone, both trained by one method, over all suites of a purpose."""

    method: str
    arm: str
    purpose: str
    found: Comparison
    words: str


@dataclass(frozen=True)
class ScoreValidity:
    """A score's buckets against their costs."""

    score: str
    buckets: int
    cost: str
    found: Validity
    order: OrderNull
    points: tuple[Point, ...]
    words: str


@dataclass(frozen=True)
class DepthControl:
    """Score against cost over all arms of the usual size, with the layer of their heads held constant."""

    score: str
    cost: str
    found: PartialCorrelation


@dataclass(frozen=True)
class ZoneNull:
    """A zone among random selections of as many heads."""

    zone: str
    cost: str
    found: NullPosition
    words: str


@dataclass(frozen=True)
class MapAgreement:
    """Two scores of the heads: of one map, or the same score of two."""

    one: str
    other: str
    found: Agreement


@dataclass(frozen=True)
class BudgetCheck:
    """The predicted cost of every budget, and what arms that were trained lost beside it."""

    curve: CostCurve
    arms: tuple[str, ...]
    heads: tuple[int, ...]
    predicted: tuple[float, ...]
    lost: tuple[float | None, ...]
    check: Check


@dataclass(frozen=True)
class Findings:
    """All of it, and what follows in words."""

    comparisons: tuple[ArmComparison, ...]
    validities: tuple[ScoreValidity, ...]
    depths: tuple[DepthControl, ...]
    nulls: tuple[ZoneNull, ...]
    agreements: tuple[MapAgreement, ...]
    budget: BudgetCheck | None

    @property
    def verdict(self) -> list[str]:
        """The main sentences: the safe zone against the others in utility and safety, C against costs, the null."""
        words = [found.words for found in self.comparisons if found.purpose != "over-refusal"]
        words += [found.words for found in self.validities if found.score == "conflict"]
        return [*words, *(found.words for found in self.nulls)]


def findings(results: Results, study: StudyConfig) -> Findings:
    """Everything that these results allow."""
    cmap = results.maps.get("main")
    return Findings(
        comparisons=tuple(_comparisons(results, study)),
        validities=tuple(_validities(results, study)),
        depths=tuple(_depth_controls(results)),
        nulls=tuple(_nulls(results, study)),
        agreements=tuple(_agreements(results)),
        # Scores are made of ranks within a kind of unit and do not add up over several.
        budget=_budget(cmap, results) if cmap is not None and len(cmap.kinds) == 1 else None,
    )


def cost_of(trial: Trial, base: Measured | None, cost: str) -> tuple[float | None, float | None]:
    """What a trial cost, and its standard error over examples where it has one; None where it is undefined."""
    if cost == "utility_lost":
        return (None, None) if base is None else utility_lost(trial.measured, base)
    ratio = trial.cost_ratio if cost == "ucr" else trial.mmlu_cost_ratio
    return (None if ratio is None else ratio.value), None


def outcomes(trials: Sequence[Trial], purpose: str) -> Outcomes:
    """Outcomes of all examples of the suites of a purpose, in one order, for every seed."""
    return {
        trial.seed: [
            outcome
            for suite in sorted(s.suite for s in trial.measured.suites if s.purpose == purpose)
            for _, outcome in sorted(trial.measured.outcomes[suite].items())
        ]
        for trial in trials
    }


def _comparisons(results: Results, study: StudyConfig) -> list[ArmComparison]:
    found = []
    for method in study.methods:
        suffix = method_suffix(method)
        safe = results.of(f"{REFERENCE}{suffix}")
        others = {arm: results.of(f"{arm}{suffix}") for arm in study.arms if arm != REFERENCE}
        seeds = {trial.seed for trial in safe}
        # Arms of which a seed is missing would be compared over other seeds.
        others = {arm: trials for arm, trials in others.items() if {t.seed for t in trials} == seeds and seeds}
        for purpose in PURPOSES:
            reference = outcomes(safe, purpose)
            if not others or not any(reference.values()):
                continue
            compared = compare_with(reference, {arm: outcomes(trials, purpose) for arm, trials in others.items()})
            for arm, comparison in compared.items():
                words = comparison_verdict(
                    comparison, first=f"{arm}{suffix}", second=f"{REFERENCE}{suffix}", metric=_METRICS[purpose]
                )
                found.append(ArmComparison(method, arm, purpose, comparison, words))
    return found


def _points(trials: Sequence[Trial], base: Measured | None, score: str, cost: str) -> list[Point]:
    points = []
    for trial in trials:
        value, error = cost_of(trial, base, cost)
        points.append(
            Point(
                arm=trial.arm,
                seed=trial.seed,
                score=trial.scores[score],
                depth=trial.depth,
                cost=value,
                cost_se=error,
            )
        )
    return points


def _validities(results: Results, study: StudyConfig) -> list[ScoreValidity]:
    wanted = []
    for buckets in study.buckets:
        for score in study.scores:
            arms = [study.bucket(number, buckets, score) for number in range(1, buckets + 1)]
            trials = [trial for arm in arms for trial in results.of(arm)]
            # MMLU-CR needs MMLU among the suites.
            costs = [c for c in COSTS if c != "mmlu_cr" or any(t.mmlu_cost_ratio is not None for t in trials)]
            wanted += [(score, buckets, cost, _points(trials, results.base, score, cost)) for cost in costs if trials]
    tested = [predictive_validity(points) for *_, points in wanted]
    adjusted = holm([found.of_means.pearson_p for found in tested])
    made = []
    for (score, buckets, cost, points), found, p in zip(wanted, tested, adjusted, strict=True):
        words = verdict(found, score=SYMBOLS[score], cost=COSTS[cost], p_adjusted=p, n_comparisons=len(tested))
        means = arm_means(points)
        order = order_null(means.score_A.tolist(), means.cost_A.tolist())
        made.append(ScoreValidity(score, buckets, cost, found, order, tuple(points), f"{buckets} buckets: {words}"))
    return made


def _depth_controls(results: Results) -> list[DepthControl]:
    usual = results.of(REFERENCE)
    if not usual:
        return []
    n_heads = len(usual[0].selection.all_units)
    # Buckets differ by a head where the number of heads is no multiple.
    arms = [t for t in _plain(results) if abs(len(t.selection.all_units) - n_heads) <= 1]
    found = []
    for score in SCORE_COLUMNS:
        for cost in ("ucr", "utility_lost"):
            means = arm_means(_points(arms, results.base, score, cost))
            partial = partial_correlation(means.score_A.tolist(), means.cost_A.tolist(), means.depth_A.tolist())
            found.append(DepthControl(score, cost, partial))
    return found


def _nulls(results: Results, study: StudyConfig) -> list[ZoneNull]:
    """Every zone's training with the first seed among trainings of random heads with as many seeds of their own."""
    draws = [t for t in results.trials if t.calibration == "main" and t.arm == "random"]
    found = []
    for zone in ("safe", "risky"):
        trials = [trial for trial in results.of(zone) if trial.seed == study.seeds[0]]
        for cost in ("ucr", "utility_lost") if trials and len(draws) > 1 else ():
            value, _ = cost_of(trials[0], results.base, cost)
            place = null_position(value, [cost_of(trial, results.base, cost)[0] for trial in draws])
            found.append(ZoneNull(zone, cost, place, null_verdict(place, zone=zone, cost=COSTS[cost])))
    return found


def _agreements(results: Results) -> list[MapAgreement]:
    if "main" not in results.maps:
        return []
    main = results.maps["main"]
    layers = [layer for layer, _ in main.heads]
    score = main.column("conflict_score")
    pairs = [
        (f"{SYMBOLS['conflict']} (main)", f"{SYMBOLS[name]} (main)", main.column(SCORE_COLUMNS[name]))
        for name in ("gradient", "sensitivity")
    ]
    pairs += [
        ("C (main)", f"C ({name})", cmap.column("conflict_score"))
        for name, cmap in results.maps.items()
        if name != "main" and cmap.units == main.units
    ]
    return [
        MapAgreement(one, other, map_agreement(score.tolist(), column.tolist(), layers=layers))
        for one, other, column in pairs
    ]


def _budget(cmap: ConflictMap, results: Results) -> BudgetCheck:
    score_H = cmap.column("conflict_score").tolist()
    row_of = {unit: row for row, unit in enumerate(cmap.units)}
    names = list(dict.fromkeys(trial.arm for trial in _plain(results)))
    predicted, lost, heads = [], [], []
    for name in names:
        trials = results.of(name)
        shares = [predicted_cost(score_H, [row_of[unit] for unit in trial.selection.all_units]) for trial in trials]
        losses = [cost_of(trial, results.base, "utility_lost")[0] for trial in trials]
        known = [loss for loss in losses if loss is not None]
        predicted.append(sum(shares) / len(shares))
        lost.append(sum(known) / len(known) if len(known) == len(losses) else None)
        heads.append(len(trials[0].selection.all_units))
    return BudgetCheck(
        curve=map_curve(cmap),
        arms=tuple(names),
        heads=tuple(heads),
        predicted=tuple(predicted),
        lost=tuple(lost),
        check=check_against(predicted, lost),
    )


def map_curve(cmap: ConflictMap) -> CostCurve:
    """The predicted cost of training the safest heads of a map, with a band where the map has intervals."""
    low, high = cmap.column("conflict_score_low"), cmap.column("conflict_score_high")
    known = np.isfinite(low).all() and np.isfinite(high).all()
    errors = standard_errors(low.tolist(), high.tolist()).tolist() if known else None
    return cost_curve(cmap.column("conflict_score").tolist(), errors)


def _plain(results: Results) -> list[Trial]:
    """Trials of the main map that are trained as the recipe says."""
    return [t for t in results.trials if t.calibration == "main" and t.method == "sft" and not t.is_draw]
