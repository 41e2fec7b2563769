"""What the trials of a study show: comparisons of arms, at full strength and at equal safety, scores against costs,
nulls, maps and budgets. Pure.

Every number here comes with what it was computed from; every sentence follows from its interval (`verdicts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from castune.artifacts import ConflictMap
from castune.config import StudyConfig, method_suffix
from castune.purposes import COSTS, PURPOSES
from castune.report.equal_safety import sentences
from castune.selection import SCORE_COLUMNS
from castune.stats.comparisons import Comparison, Outcomes, compare, holm
from castune.stats.correlations import Agreement, map_agreement
from castune.stats.cost_curve import CostCurve, predicted_cost
from castune.stats.nulls import NullPosition, Stratum, null_position
from castune.stats.safety_costs import SafetyCosts
from castune.study.budget import Check, check_against, map_curve
from castune.study.equal_safety import costs_by_method, primary, with_costs
from castune.study.primary import PrimaryFinding
from castune.study.realised_costs import cost_alone, costs_of
from castune.study.score_costs import SYMBOLS, Control, ScoreValidity, controlled_costs, controls, validities
from castune.study.trials import REFERENCE, Measured, Results, Trial, over_common_seeds, plain_trials
from castune.study.verdicts import comparison_verdict, null_verdict, unseen_verdict

_NO_PRIMARY = (
    "The primary contrast of the recipe cannot be told yet: it needs both arms, at several strengths, with a gain in "
    "safety, and a suite that measures its cost."
)


@dataclass(frozen=True)
class ArmComparison:
    """An arm against the safe zone, both trained by one method, over all suites of a purpose and the seeds of both."""

    method: str
    arm: str
    purpose: str
    found: Comparison
    words: str


@dataclass(frozen=True)
class ZoneNull:
    """A zone among random selections of as many heads, each beside the zone's training with its seed."""

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
    """The predicted cost of every budget, and what arms that were trained lost beside it, over the seeds of all.

    Attributes:
        curve: of the map.
        n_seeds: that all arms have.
        n_scored: of every arm those of them in which every utility suite has something scored.
        arms: their names.
        heads: how many each has.
        predicted: share of the cost of all heads.
        lost: utility, in points; the mean over the scored seeds, None without any.
        check: of the predicted against the lost.
    """

    curve: CostCurve
    n_seeds: int
    n_scored: tuple[int, ...]
    arms: tuple[str, ...]
    heads: tuple[int, ...]
    predicted: tuple[float, ...]
    lost: tuple[float | None, ...]
    check: Check


@dataclass(frozen=True)
class Findings:
    """All of it, and what follows in words.

    Attributes:
        primary: the comparison that the study is made to decide; None where there is none, or it is not measured yet.
        declared: whether the recipe declares one.
        equal_safety: what the arms of every method cost at one safety, where they were evaluated at several strengths.
    """

    comparisons: tuple[ArmComparison, ...]
    primary: PrimaryFinding | None
    equal_safety: Mapping[str, SafetyCosts]
    validities: tuple[ScoreValidity, ...]
    controls: tuple[Control, ...]
    nulls: tuple[ZoneNull, ...]
    agreements: tuple[MapAgreement, ...]
    budget: BudgetCheck | None
    declared: bool = False

    @property
    def headline(self) -> list[str]:
        """What the study was made to decide; without a primary contrast what arms cost at equal safety."""
        if self.primary is not None:
            return self.primary.words
        others = next((sentences(costs) for costs in self.equal_safety.values()), self.verdict[:3])
        return [_NO_PRIMARY, *others] if self.declared else others

    @property
    def verdict(self) -> list[str]:
        """All sentences: the primary contrast; costs at equal safety; differences from the safe zone that are
        seen, and, a method and purpose at a time, those that are not; C against costs; the null."""
        words = [] if self.primary is None else self.primary.words
        words += [sentence for costs in self.equal_safety.values() for sentence in sentences(costs)]
        for method, purpose in dict.fromkeys((found.method, found.purpose) for found in self.comparisons):
            group = [found for found in self.comparisons if (found.method, found.purpose) == (method, purpose)]
            unseen = [found for found in group if found.found.interval is not None and not found.found.is_seen]
            words += [found.words for found in group if found not in unseen]
            if unseen:
                suffix = method_suffix(method)
                by_arm = {f"{found.arm}{suffix}": found.found for found in unseen}
                words.append(unseen_verdict(by_arm, second=f"{REFERENCE}{suffix}", about=PURPOSES[purpose]))
        words += [found.words for found in self.validities if found.score == "conflict"]
        return [*words, *(found.words for found in self.nulls)]


def findings(results: Results, study: StudyConfig) -> Findings:
    """Everything that these results allow."""
    cmap = results.maps.get("main")
    at_safety = costs_by_method(results, study, REFERENCE)
    results = with_costs(results, at_safety["sft"].target if "sft" in at_safety else None)
    return Findings(
        comparisons=tuple(_comparisons(results, study)),
        primary=primary(results, study),
        declared=study.primary is not None,
        equal_safety=at_safety,
        validities=tuple(validities(results, study)),
        controls=tuple(controls(results, study)),
        nulls=tuple(_nulls(results)),
        agreements=tuple(_agreements(results)),
        # Scores are made of ranks within a kind of unit and do not add up over several.
        budget=_budget(cmap, results) if cmap is not None and len(cmap.kinds) == 1 else None,
    )


def outcomes(trials: Sequence[Trial], purpose: str) -> Outcomes:
    """Outcomes of all examples of the suites of a purpose, for every seed."""
    return {
        trial.seed: {
            suite.suite: trial.measured.outcomes[suite.suite]
            for suite in trial.measured.suites
            if suite.purpose == purpose
        }
        for trial in trials
    }


def _comparisons(results: Results, study: StudyConfig) -> list[ArmComparison]:
    """Every arm against the safe zone of its method. What is asked together, of all methods and purposes, is one family
    of tests (Holm); an arm without a training that the zone has too counts among them."""
    asked: list[tuple[str, str, str, Comparison | None]] = []
    for method in study.methods:
        suffix = method_suffix(method)
        safe = {trial.seed: trial for trial in results.of(f"{REFERENCE}{suffix}")}
        for purpose in next((trial.measured.purposes for trial in safe.values()), []):
            if not any(outcomes(list(safe.values()), purpose).values()):
                continue
            for arm in (arm for arm in study.arms if f"{arm}{suffix}" in study.main_arms):
                if arm != REFERENCE:
                    asked.append((method, arm, purpose, _compared(results.of(f"{arm}{suffix}"), safe, purpose)))
    adjusted = holm([None if found is None else found.p for *_, found in asked])
    made = []
    for (method, arm, purpose, comparison), p in zip(asked, adjusted, strict=True):
        if comparison is None:
            continue
        comparison = replace(comparison, p_adjusted=p, n_comparisons=len(asked))
        suffix = method_suffix(method)
        words = comparison_verdict(
            comparison, first=f"{arm}{suffix}", second=f"{REFERENCE}{suffix}", about=PURPOSES[purpose]
        )
        made.append(ArmComparison(method, arm, purpose, comparison, words))
    return made


def _compared(trials: Sequence[Trial], safe: Mapping[int, Trial], purpose: str) -> Comparison | None:
    """An arm against the safe zone over the seeds with which both have scores; None without a seed of both."""
    pairs = [(trial, safe[trial.seed]) for trial in trials if trial.seed in safe]
    if not pairs:
        return None
    # Where no seed has, all are given: the comparison then counts what it had to leave out.
    scored = [pair for pair in pairs if _is_scored(*pair, purpose)] or pairs
    first, second = (outcomes(side, purpose) for side in zip(*scored, strict=True))
    return replace(compare(first, second), n_seeds_unscored=len(pairs) - len(scored))


def _is_scored(one: Trial, other: Trial, purpose: str) -> bool:
    """Whether every suite of a purpose has an example that is scored under both."""
    sides = [one.measured.outcomes, other.measured.outcomes]
    return all(
        any(
            value is not None and sides[1][suite].get(example) is not None for example, value in sides[0][suite].items()
        )
        for suite in one.measured.suites_of(purpose)
    )


def _nulls(results: Results) -> list[ZoneNull]:
    """Every zone's trainings among those of random heads with the same seeds; the arm `random` is a draw a seed."""
    draws = [t for t in results.trials if t.calibration == "main" and t.arm == "random"]
    places = []
    for zone in ("safe", "risky"):
        trials = results.of(zone)
        for cost in controlled_costs(results) if trials and len(draws) > 1 else ():
            strata = [
                Stratum(
                    _bounded_or_not(trial, results.base, cost),
                    [_bounded_or_not(draw, results.base, cost) for draw in draws if draw.seed == trial.seed],
                )
                for trial in trials
            ]
            places.append((zone, cost, null_position(strata)))
    adjusted = holm([place.p for *_, place in places])
    unusual = holm([place.p_unusual for *_, place in places])
    return [
        ZoneNull(
            zone,
            cost,
            place,
            null_verdict(
                place,
                zone=zone,
                cost=COSTS[cost].phrase,
                p_adjusted=p,
                p_unusual_adjusted=p_unusual,
                n_comparisons=len(places),
            ),
        )
        for (zone, cost, place), p, p_unusual in zip(places, adjusted, unusual, strict=True)
    ]


def _bounded_or_not(trial: Trial, base: Measured | None, cost: str) -> float | None:
    """What one training cost; without any gain in safety, or without the common one, it is the worst there is, not a
    missing one."""
    ratio = trial.cost_ratios.get(cost)
    if ratio is not None and ratio.value is None:
        return math.inf
    if COSTS[cost].at_safety and trial.at_safety.get(COSTS[cost].purpose, (0.0, None))[0] is None:
        return math.inf
    return cost_alone(trial, base, cost)


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
    compared = over_common_seeds(plain_trials(results))
    names = list(dict.fromkeys(trial.arm for trial in compared))
    predicted, lost, n_scored, heads = [], [], [], []
    for name in names:
        trials = [trial for trial in compared if trial.arm == name]
        shares = [predicted_cost(score_H, [row_of[unit] for unit in trial.selection.units]) for trial in trials]
        losses = [loss for loss, _ in costs_of(trials, results.base, "utility_lost")]
        known = [loss for loss in losses if loss is not None]
        predicted.append(sum(shares) / len(shares))
        lost.append(sum(known) / len(known) if known else None)
        n_scored.append(len(known))
        heads.append(len(trials[0].selection.units))
    return BudgetCheck(
        curve=map_curve(cmap),
        n_seeds=len({trial.seed for trial in compared}),
        n_scored=tuple(n_scored),
        arms=tuple(names),
        heads=tuple(heads),
        predicted=tuple(predicted),
        lost=tuple(lost),
        check=check_against(predicted, lost),
    )
