"""What a study has measured: a trial an arm and seed, read from the run directories.

Of an evaluation only the outcomes are kept, not the replies: a study of the paper's size has a million of them, and
several times as many where adapters are measured at several strengths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from castune.artifacts import ConflictMap, EvalResult, HeadSelection, SuiteResult, Unit
from castune.artifacts.conflict_map import MAGNITUDE
from castune.artifacts.samples import references_of
from castune.diagnosis.score import gradient_norms
from castune.diagnosis.stored import GRADIENTS_FILE, stored_measurements
from castune.purposes import PURPOSES
from castune.selection import SCORE_COLUMNS
from castune.stats.estimates import CostRatio
from castune.steps.changes import all_cost_ratios
from castune.steps.directory import BASE, RunDirectory
from castune.study.graph import MAIN, Graph, Run, run_label

# The arm that every other one is compared with: what the method recommends.
REFERENCE = "safe"


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
            # Every evaluation has the same examples: their names are kept once.
            outcomes[sample["suite"]][sys.intern(sample["id"])] = None if outcome is None else float(outcome)
        return cls(result.suites, outcomes)

    def outcomes_of(self, suite: str) -> list[float | None]:
        """Outcomes of the examples of a suite, in their order."""
        return list(self.outcomes[suite].values())

    def suites_of(self, purpose: str) -> list[str]:
        """Names of the suites of a purpose."""
        return [suite.suite for suite in self.suites if suite.purpose == purpose]

    @property
    def purposes(self) -> list[str]:
        """What is measured: utility first, safety and over-refusal always, the others where a suite is of them."""
        found = [name for name, about in PURPOSES.items() if not about.is_continuous or self.suites_of(name)]
        return sorted(found, key=lambda purpose: purpose != "utility")

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
        seed: of the training, and of random selections but for the further ones.
        is_draw: whether it is one of these; what its heads were drawn with says `selection.seed`.
        selection: its heads.
        scores: mean score of its heads, by names of scores; without `magnitude` where the map does not hold it.
        depth: mean layer of its heads.
        measured: its evaluation.
        cost_ratios: by `purposes.RATIOS`, each with its interval over examples; not those that lack a number.
        strengths: its evaluations at the other strengths of the recipe; empty where one is missing.
        gradient_size: mean over its heads of the logarithm of the sizes of both gradients; None where they are gone.
        at_safety: what it costs where all arms are equally safe, above base, with the standard error over examples, by
            purpose (`equal_safety.with_costs`); (None, None) where it does not reach that safety, nothing where that
            was not measured or has no score at a strength.
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
    cost_ratios: Mapping[str, CostRatio]
    strengths: Mapping[float, Measured] = field(default_factory=dict)
    gradient_size: float | None = None
    at_safety: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its run and arm, as in names of units."""
        return f"{run_label(self.calibration, self.seed, self.selection.seed if self.is_draw else None)}/{self.arm}"

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
        missing: what is not there, as labels of trials: `CALIBRATION/SEED/ARM`.
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


def common_seeds(arms: Iterable[Sequence[Trial]]) -> set[int]:
    """Seeds with which every arm was trained, of those that were trained at all: over these they differ in nothing but
    their heads and method."""
    seeds = [{trial.seed for trial in trials} for trials in arms if trials]
    return set.intersection(*seeds) if seeds else set()


def over_common_seeds(trials: Sequence[Trial]) -> list[Trial]:
    """Those with a seed that all arms among them have."""
    names = dict.fromkeys(trial.arm for trial in trials)
    seeds = common_seeds([trial for trial in trials if trial.arm == name] for name in names)
    return [trial for trial in trials if trial.seed in seeds]


def most_comparable(arms: Mapping[str, Sequence[Trial]], *, reference: str | None = None) -> dict[str, list[Trial]]:
    """As many arms as have two seeds in common, over all seeds that these have in common.

    An arm that has not would leave the others one training each, or none. Where two seeds would leave no more than half
    of the arms, one seed is enough, and the arms are as many as share it.

    Args:
        arms: trials of every arm, one a seed.
        reference: an arm that is kept in any case, where it has trials.
    """
    seeds = {arm: {trial.seed for trial in trials} for arm, trials in arms.items() if trials}
    usable = seeds.get(reference or "") or set().union(*seeds.values())

    def holding(some: tuple[int, ...]) -> list[str]:
        return [arm for arm, of_arm in seeds.items() if of_arm.issuperset(some)]

    def shared(names: Sequence[str]) -> set[int]:
        return set.intersection(*(seeds[arm] for arm in names)) if names else set()

    kept: list[str] = []
    for n in (2, 1):
        groups = [holding(some) for some in combinations(sorted(usable), n)]
        kept = max(groups, key=lambda names: (len(names), len(shared(names))), default=[])
        if 2 * len(kept) > len(seeds):
            break
    common = shared(kept)
    return {arm: [trial for trial in arms[arm] if trial.seed in common] for arm in kept}


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
    sizes = {name: _gradient_sizes(folders[name], cmap) for name, cmap in maps.items()}
    trials: list[Trial] = []
    missing: list[str] = []
    for run in graph.runs:
        cmap = maps.get(run.calibration)
        here = {} if cmap is None or found is None else _trained(run, cmap, found, sizes[run.calibration])
        for arm, trained in run.same_as.items():
            if trained in here:
                trials.append(replace(here[trained], arm=arm))
            else:
                missing.append(f"{run.label}/{arm}")
    settings = {} if found is None else found.settings
    return Results(maps, None if found is None else Measured.of(found), tuple(trials), tuple(missing), settings)


def _trained(run: Run, cmap: ConflictMap, base: EvalResult, sizes: Mapping[Unit, float]) -> dict[str, Trial]:
    """The finished arms of a run directory by the names of their directories; of the main map with all strengths."""
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
        if not _is_beside(result, base, adapter):
            continue
        ratios = all_cost_ratios({BASE: base, name: result})
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
            cost_ratios={ratio: of_arms[name] for ratio, of_arms in ratios.items()},
            strengths=_at_strengths(run, name, base, adapter) if run.calibration == MAIN else {},
            gradient_size=float(np.mean([sizes[one] for one in selection.units])) if sizes else None,
        )
    return trials


def _gradient_sizes(folder: RunDirectory, cmap: ConflictMap) -> dict[Unit, float]:
    """Of every unit the mean logarithm of |g_safe| and |g_util|; empty where a map's gradients were not kept."""
    if not (folder.path / GRADIENTS_FILE).is_file():
        return {}
    measured = stored_measurements(folder.path, cmap, "castune study")
    norms = [norm_H for domain in measured.domains for norm_H in gradient_norms(domain.gram_HCC, measured.n_safety)]
    # A gradient that is exactly zero has no logarithm.
    size_H = np.mean([np.log(np.maximum(norm_H, 1e-30)) for norm_H in norms], axis=0)
    return dict(zip(cmap.units, size_H.tolist(), strict=True))


def _at_strengths(run: Run, name: str, base: EvalResult, adapter: str) -> dict[float, Measured]:
    """Evaluations of an arm at the other strengths of its adapter; none where one is not there yet."""
    folder, found = RunDirectory(run.folder), {}
    for strength in run.recipe.evaluate.strengths:
        if strength == 1:
            continue
        if not folder.is_evaluated(name, strength):
            return {}
        result = EvalResult.load(folder.at_strength(name, strength))
        if not _is_beside(result, base, adapter):
            return {}
        found[strength] = Measured.of(result)
    return found


def _is_beside(result: EvalResult, base: EvalResult, adapter: str) -> bool:
    """Whether an evaluation can be compared with the base model's.

    It cannot before it is judged, or where it is of earlier settings, of an earlier training, or of replies that the
    base model gave before, and was not made again.
    """
    return (
        result.settings["judge"] == base.settings["judge"]
        and _data_of(result) == _data_of(base)
        and result.model["adapter"] == adapter
        and references_of(result.samples) == references_of(base.samples)
    )


def _data_of(result: EvalResult) -> list[tuple[str, str]]:
    return [(suite.suite, suite.data_hash) for suite in result.suites]


def mean_scores(cmap: ConflictMap, units: Sequence[Unit]) -> dict[str, float]:
    """Mean scores of heads, or other units, of a map: what a bucket's cost is predicted by (Section 5.3)."""
    row_of = {unit: row for row, unit in enumerate(cmap.units)}
    rows = [row_of[unit] for unit in units]
    columns = {score: column for score, column in SCORE_COLUMNS.items() if column != MAGNITUDE or cmap.has_magnitudes}
    return {score: float(cmap.column(column)[rows].mean()) for score, column in columns.items()}


def plain_trials(results: Results) -> list[Trial]:
    """Trials of the main map that are trained as the recipe says; a training once, under the first name that its arm
    has with any seed."""
    found: dict[tuple[str, int], Trial] = {}
    arm_of: dict[str, str] = {}
    for trial in results.trials:
        if trial.calibration == "main" and trial.method == "sft" and not trial.is_draw:
            arm = arm_of.setdefault(trial.trained, trial.arm)
            found.setdefault((trial.trained, trial.seed), replace(trial, arm=arm))
    return list(found.values())
