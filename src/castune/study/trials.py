"""What a study has measured: a trial an arm and seed, read from the run directories.

Of an evaluation only the outcomes are kept, not the replies: a study of the paper's size has a million of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, SuiteResult, Unit
from castune.selection import SCORE_COLUMNS
from castune.stats.estimates import CostRatio
from castune.steps.changes import cost_ratios
from castune.steps.directory import BASE, RunDirectory
from castune.study.graph import Graph, Run

PURPOSES = ("utility", "safety", "over-refusal")
MMLU = "mmlu"


@dataclass(frozen=True)
class Measured:
    """What an evaluation says: the results of its suites, and the outcome of every example of each."""

    suites: tuple[SuiteResult, ...]
    outcomes: dict[str, dict[str, float | None]]

    @classmethod
    def of(cls, result: EvalResult) -> Measured:
        """The evaluation without its replies."""
        outcomes: dict[str, dict[str, float | None]] = {suite.suite: {} for suite in result.suites}
        for sample in result.samples:
            outcome = sample["outcome"]
            outcomes[sample["suite"]][sample["id"]] = None if outcome is None else float(outcome)
        return cls(result.suites, outcomes)

    def rate(self, suite: str) -> float | None:
        """The rate of a suite; None where nothing was scored."""
        return next((found.value for found in self.suites if found.suite == suite), None)

    def mean(self, purpose: str) -> float | None:
        """Unweighted mean over the suites of a purpose, as the paper averages; None if one is missing or unscored."""
        values = [suite.value for suite in self.suites if suite.purpose == purpose]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if values and len(known) == len(values) else None


@dataclass(frozen=True)
class Trial:
    """An arm, trained with one seed and evaluated.

    Attributes:
        calibration: the map it was chosen from, `main` for the study's own.
        arm: its name in the study.
        trained: name of its directory; another name where an arm of the same heads was trained before.
        seed: of random selections and training.
        is_draw: whether it is one of the further random selections.
        selection: its heads.
        scores: mean C, O and S of its heads, by `conflict`, `gradient`, `sensitivity`.
        depth: mean layer of its heads.
        measured: its evaluation.
        cost_ratio: UCR (Eq. 7) with its interval over examples; None where a number for it is missing.
        mmlu_cost_ratio: MMLU-CR (Eq. 8); None also where MMLU was not measured.
    """

    calibration: str
    arm: str
    trained: str
    seed: int
    is_draw: bool
    selection: HeadSelection
    scores: dict[str, float]
    depth: float
    measured: Measured
    cost_ratio: CostRatio | None
    mmlu_cost_ratio: CostRatio | None

    @property
    def heads(self) -> str:
        """The arm's name without what is trained differently."""
        return self.arm.partition("+")[0]

    @property
    def method(self) -> str:
        """What is trained differently from the recipe, `sft` for nothing."""
        return self.arm.partition("+")[2] or "sft"


@dataclass(frozen=True)
class Results:
    """All that a study has so far.

    Attributes:
        maps: the conflict maps by calibration.
        base: the evaluation of the base model; None before it is made.
        trials: those that are evaluated, in the order of the graph.
        missing: what is not there, as `CALIBRATION/SEED/ARM`.
        settings: how it was evaluated: judge, max_new_tokens and so on.
    """

    maps: dict[str, ConflictMap]
    base: Measured | None
    trials: tuple[Trial, ...]
    missing: tuple[str, ...]
    settings: dict[str, object]

    def of(self, arm: str, calibration: str = "main") -> list[Trial]:
        """The trials of an arm, one a seed."""
        return [t for t in self.trials if (t.arm, t.calibration, t.is_draw) == (arm, calibration, False)]


def read_results(graph: Graph) -> Results:
    """What is there of a study; arms that are not finished are named, not guessed.

    Raises:
        ArtifactError: an artifact is damaged, or was made from another one than lies beside it.
    """
    folders = {name: RunDirectory(Path(recipe.out)) for name, recipe in graph.maps.items()}
    maps = {name: folder.load_map() for name, folder in folders.items() if folder.map_file.is_file()}
    found: EvalResult | None = None
    base_folder = RunDirectory(graph.base_folder)
    if base_folder.is_evaluated(BASE):
        found = EvalResult.load(base_folder.evaluation(BASE))
    trials: list[Trial] = []
    missing: list[str] = []
    for run in graph.runs:
        cmap = maps.get(run.calibration)
        here = {} if cmap is None or found is None else _trained(run, cmap, found)
        for arm, trained in run.same_as.items():
            if trained in here:
                trials.append(replace(here[trained], arm=arm))
            else:
                missing.append(f"{run.label}/{arm}")
    settings = {} if found is None else found.settings
    return Results(maps, None if found is None else Measured.of(found), tuple(trials), tuple(missing), settings)


def _trained(run: Run, cmap: ConflictMap, base: EvalResult) -> dict[str, Trial]:
    """The finished arms of a run directory by the names of their directories."""
    folder = RunDirectory(run.folder)
    trials = {}
    for name in run.trained:
        arm = folder.side_arm(name)
        if not (arm.is_trained and folder.is_evaluated(name)):
            continue
        selection = folder.load_selection(arm, cmap)
        # Refuses an adapter that is not the one of its certificate.
        adapter = folder.load_tuning(arm, selection).certificate.adapter_hash
        result = EvalResult.load(folder.evaluation(name))
        if result.settings["judge"] != base.settings["judge"]:
            continue  # not judged yet
        if _data_of(result) != _data_of(base) or result.model["adapter"] != adapter:
            continue  # of earlier settings, or an earlier training, and not made again
        pair = {BASE: base, name: result}
        trials[name] = Trial(
            calibration=run.calibration,
            arm=name,
            trained=name,
            seed=run.seed,
            is_draw=run.is_draw,
            selection=selection,
            scores=mean_scores(cmap, selection.units),
            depth=float(np.mean([one.layer for one in selection.units])),
            measured=Measured.of(result),
            cost_ratio=cost_ratios(pair).get(name),
            mmlu_cost_ratio=cost_ratios(pair, MMLU).get(name),
        )
    return trials


def _data_of(result: EvalResult) -> list[tuple[str, str]]:
    return [(suite.suite, suite.data_hash) for suite in result.suites]


def mean_scores(cmap: ConflictMap, units: Sequence[Unit]) -> dict[str, float]:
    """Mean C, O and S over heads, or other units, of a map: what a bucket's cost is predicted by (Section 5.3)."""
    row_of = {unit: row for row, unit in enumerate(cmap.units)}
    rows = [row_of[unit] for unit in units]
    return {score: float(cmap.column(column)[rows].mean()) for score, column in SCORE_COLUMNS.items()}


def utility_lost(after: Measured, before: Measured) -> tuple[float | None, float | None]:
    """Points of utility accuracy lost, the unweighted mean over suites, and its standard error, paired by example."""
    gained, error = _gained(after, before, [suite.suite for suite in before.suites if suite.purpose == "utility"])
    return None if gained is None else -gained, error


def costs_of(trials: Sequence[Trial], base: Measured | None, cost: str) -> list[tuple[float | None, float | None]]:
    """What the trainings of one arm cost, each with its standard error over examples; None where it is undefined.

    A ratio (`ucr`, Eq. 7; `mmlu_cr`, Eq. 8) divides by a gain in safety that a single training may hardly have, so an
    arm has one: that of its mean rates, as in Table 7. Its trainings have the ratio's linear approximation there; their
    mean is the arm's ratio, and their spread its noise. `utility_lost` is linear and is that of each training.

    Args:
        trials: of one arm.
        base: the base model.
        cost: ucr, mmlu_cr or utility_lost.
    """
    nothing: list[tuple[float | None, float | None]] = [(None, None)] * len(trials)
    if base is None:
        return nothing
    if cost == "utility_lost":
        return [utility_lost(trial.measured, base) for trial in trials]
    utility = [s.suite for s in base.suites if s.purpose == "utility" and (cost == "ucr" or s.suite == MMLU)]
    safety = [suite.suite for suite in base.suites if suite.purpose == "safety"]
    losses = [_gained(trial.measured, base, utility) for trial in trials]
    gains = [_gained(trial.measured, base, safety) for trial in trials]
    lost_T = [-value for value, _ in losses if value is not None]
    gained_T = [value for value, _ in gains if value is not None]
    if len(lost_T) < len(trials) or len(gained_T) < len(trials) or not trials:
        return nothing
    lost, gained = sum(lost_T) / len(trials), sum(gained_T) / len(trials)
    if gained <= 0:
        return nothing
    ratio = max(0.0, lost / gained)
    found: list[tuple[float | None, float | None]] = []
    for (_, loss_error), (_, gain_error), loss, gain in zip(losses, gains, lost_T, gained_T, strict=True):
        value = ratio + ((loss - lost) - ratio * (gain - gained)) / gained
        known = loss_error is not None and gain_error is not None
        error = math.hypot(loss_error or 0.0, ratio * (gain_error or 0.0)) / gained if known else None
        found.append((value, error))
    return found


def _gained(after: Measured, before: Measured, suites: Sequence[str]) -> tuple[float | None, float | None]:
    """Points gained, the unweighted mean over suites, and its standard error, both paired by example."""
    gains, variances = [], []
    for suite in suites:
        pairs = [
            (was, after.outcomes[suite][example])
            for example, was in before.outcomes[suite].items()
            if example in after.outcomes.get(suite, {})
        ]
        changes = np.array([100 * (now - was) for was, now in pairs if was is not None and now is not None])
        if not len(changes):
            return None, None
        gains.append(float(changes.mean()))
        variances.append(float(changes.var(ddof=1)) / len(changes) if len(changes) > 1 else math.nan)
    if not gains:
        return None, None
    variance = sum(variances) / len(variances) ** 2
    return sum(gains) / len(gains), None if math.isnan(variance) else math.sqrt(variance)
