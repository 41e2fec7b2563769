"""One adapter of a run at several strengths: what is missing is evaluated, and an adapter at one of them is written."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castune.artifacts import EvalResult, ScaledAdapter, TuneResult
from castune.artifacts.files import write_text
from castune.artifacts.fingerprints import at_strength, same_model
from castune.artifacts.records import ModelRecord
from castune.artifacts.samples import references_of
from castune.config import EvaluateConfig, Recipe
from castune.core.loading import load_model
from castune.errors import ArtifactError, CastuneError, NothingScored
from castune.evaluation.suites import Suite, load_suites
from castune.purposes import PURPOSES, SAFETY
from castune.stats.dial import Floats, Mean, Reached, StrengthCurves
from castune.stats.scored import is_far_fewer
from castune.steps.arm import Arm
from castune.steps.directory import BASE, RunDirectory
from castune.steps.equal_safety import outcomes_of
from castune.steps.evaluate import evaluate_step, judge_where_needed, stored_evaluation
from castune.steps.held_out import check_held_out
from castune.tuning.scaling import scale_adapter

logger = logging.getLogger(__name__)

# From too weak to stronger than it was trained.
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def dial(run: str | Path, *, arm: str | None = None, strengths: Sequence[float] = STRENGTHS) -> StrengthCurves:
    """What a run measures, over the strength of one of its adapters; evaluations that are missing are made.

    Args:
        run: a run directory with an adapter.
        arm: the arm; the main one when absent.
        strengths: what the adapter's update is multiplied by, above 0 to 2; 1 is always among them. Others that were
            measured before belong to the curves too.

    Returns:
        Curves by purpose of the suites (`safety`, `utility`, `nll`, ...): of safety over all prompts together, of
        others means over suites. `.at(strength)` reads them off, `.reach(purpose, target)` finds a strength.

    Raises:
        CastuneError: no such run, arm or adapter, strengths out of range, or a backend that has full strength alone.
        NothingScored: not one measure has an example that was scored at every strength.
    """
    folder = RunDirectory(Path(run))
    recipe = folder.load_recipe()
    config = recipe.evaluate
    suites = load_suites(config.suites, limit=config.limit, seed=config.seed)
    return dial_step(folder, recipe, folder.arm(arm), suites, strengths)


def dial_step(
    folder: RunDirectory, recipe: Recipe, arm: Arm, suites: Sequence[Suite], strengths: Sequence[float]
) -> StrengthCurves:
    """`dial` of an arm on loaded suites; the curves are written beside the report too (`RunDirectory.dial`)."""
    wanted = checked_strengths(strengths)
    require_adapter(folder, arm)
    if recipe.evaluate.backend != "hf":
        raise CastuneError(
            f"{folder.path} is evaluated by backend {recipe.evaluate.backend}, which has adapters at full strength "
            f"only; evaluate it here first: castune evaluate {folder.path} --backend hf"
        )
    if set(wanted) - evaluations_of(folder, recipe, arm, suites).keys():
        check_held_out(recipe, suites, folder=folder)
        evaluate_step(folder, recipe, suites, only=arm.name, strengths=wanted)
    judge_where_needed(folder, recipe.evaluate)
    curves = curves_of(evaluations_of(folder, recipe, arm, suites), suites)
    write_text(folder.dial(arm.name), to_csv(curves))
    return curves


def checked_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths in order, full strength among them, as their directories are called.

    Raises:
        CastuneError: one is not above 0, or above 2.
    """
    for strength in strengths:
        if not 0 < strength <= 2:
            raise CastuneError(
                f"strength {strength:g}: accepted are numbers above 0, at most 2; 1 is as it was trained"
            )
    return EvaluateConfig(strengths=tuple(float(f"{strength:g}") for strength in strengths)).strengths


def require_adapter(folder: RunDirectory, arm: Arm) -> None:
    """Refuse an arm without an adapter, or whose adapter is not the one its certificate was made for."""
    selection = folder.load_selection(arm, folder.load_map())
    if folder.load_adapter(arm, selection) is None:
        raise ArtifactError(f"{arm.adapter}: no adapter yet; run: castune tune {folder.path} --arm {arm.name}")


def evaluations_of(folder: RunDirectory, recipe: Recipe, arm: Arm, suites: Sequence[Suite]) -> dict[float, EvalResult]:
    """What is stored of an arm by strength, the base model at 0, as far as it was all measured as the recipe says.

    Told from files alone: no model is loaded for it.
    """
    config, cmap = recipe.evaluate, folder.load_map()
    if not folder.is_evaluated(BASE):
        return {}
    identity = EvalResult.load(folder.evaluation(BASE)).model
    base = stored_evaluation(folder.evaluation(BASE), identity, config, suites)
    made = folder.load_adapter(arm, folder.load_selection(arm, cmap))
    if base is None or made is None or not same_model(cmap.fingerprint, identity["fingerprint"]):
        return {}
    model: ModelRecord = {**identity, "adapter": made.certificate.adapter_hash}
    references = references_of(base.samples)
    found = {0.0: base}
    for strength in sorted({1.0, *folder.strengths(arm.name)}):
        place = folder.at_strength(arm.name, strength)
        one = stored_evaluation(place, at_strength(model, strength), config, suites, references)
        if one is not None:
            found[strength] = one
    return found


def curves_of(evaluations: Mapping[float, EvalResult], suites: Sequence[Suite]) -> StrengthCurves:
    """Curves by purpose, in the order in which castune names them.

    A strength at which far fewer examples of a suite are scored than of the base model (`stats.scored`) is left out of
    the curve of its purpose: else it would take its examples from all the others. A warning names it.

    Raises:
        NothingScored: of no purpose every suite has an example that was scored at every strength.
    """
    strengths = sorted(evaluations)
    results = [evaluations[strength] for strength in strengths]
    outcomes: dict[str, list[Floats]] = {}
    left_out: dict[str, list[float]] = {}
    for purpose in PURPOSES:
        of_suites = [outcomes_of(results, suite.name) for suite in suites if suite.purpose == purpose]
        if not of_suites:
            continue
        few_J = _warned_of_few(purpose, strengths, of_suites)
        scored = [np.isfinite(outcomes_JN[~few_J]).all(0).any() for outcomes_JN in of_suites]
        if not all(scored) or few_J[1:].all():
            logger.warning("%s: no example of a suite was scored at every strength, so it has no curve", purpose)
            continue
        # As in `steps.equal_safety`: harmful prompts count alike, of everything else suites do.
        outcomes[purpose] = [np.concatenate(of_suites, axis=1)] if purpose in SAFETY else of_suites
        left_out[purpose] = [strength for strength, is_few in zip(strengths, few_J, strict=True) if is_few]
    if not outcomes:
        raise NothingScored(f"{results[-1].name}: not one example of any suite was scored at every strength")
    return StrengthCurves.of(strengths, outcomes, left_out=left_out)


def _warned_of_few(purpose: str, strengths: Sequence[float], suites: Sequence[Floats]) -> NDArray[np.bool_]:
    """Whether far fewer examples of a suite are scored at each strength [J] than of the base, with a warning of each.

    The base itself is among them never, but where it has far fewer than there are, a warning says so.
    """
    few_J = np.zeros(len(strengths), dtype=bool)
    for outcomes_JN in suites:
        scored_JN = np.isfinite(outcomes_JN)
        n_base, n = int(scored_JN[0].sum()), scored_JN.shape[1]
        if is_far_fewer(n_base, n):
            logger.warning(
                "%s: the base model has no score for %d of %d examples, so the curve is of the others alone",
                purpose, n - n_base, n,
            )  # fmt: skip
        for place, n_both in enumerate((scored_JN & scored_JN[0]).sum(1).tolist()):
            if is_far_fewer(n_both, n_base):
                few_J[place] = True
                logger.warning(
                    "%s: strength %g%s is left out of the curve: %d of the %d examples that the base model has a score "
                    "for are unscored there",
                    purpose, strengths[place], ", the trained adapter itself," if strengths[place] == 1 else "",
                    n_base - n_both, n_base,
                )  # fmt: skip
    return few_J


def to_csv(curves: StrengthCurves) -> str:
    """A row a strength and measure: its mean and its change from the base model, with 95 % intervals.

    Where a strength is left out of a measure, all but its name is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = [f"{name}{end}" for name in ("mean", "change") for end in ("", "_low", "_high")]
    writer.writerow(["strength", "measure", "unit", *ends, "n", "unscored"])
    for name, measure in curves.measures.items():
        for strength, level in zip(curves.strengths_J, curves.levels(name), strict=True):
            cells: list[float | str] = [""] * (len(ends) + 2)
            if level is not None:
                cells = [*_cells(level.mean), *_cells(level.change), measure.n, measure.unscored]
            writer.writerow([f"{strength:g}", name, PURPOSES[name].unit, *cells])
    return text.getvalue()


def _cells(mean: Mean) -> list[float | str]:
    return [mean.value, *(mean.interval or ("", ""))]


def chosen_strength(reached: Reached) -> float | None:
    """The strength to take for a target: one that was measured, or in thousandths between two that were.

    Rounded so that the target is reached, or a limit kept, and never past a measured strength: behind it the curve may
    turn, and behind the last one there is none.

    Returns:
        None where no strength reaches the target, or the base model does.
    """
    if reached.strength is None or reached.between is None:
        return None
    # A strength that was measured is one of these, but for rounding errors.
    for measured in reached.between:
        if math.isclose(reached.strength, measured, abs_tol=1e-7):
            return measured or None
    # Below a thousandth more digits: 0 would be the base model.
    step = min(1e-3, 10.0 ** math.floor(math.log10(reached.strength)))
    low, high = reached.between
    steps = reached.strength / step
    rounded = (math.ceil if is_goal(reached) else math.floor)(steps) * step
    return min(max(float(f"{rounded:g}"), low), high)


def is_goal(reached: Reached) -> bool:
    """Whether the target is better than the base model: something to get to, not a limit to keep."""
    return reached.rises == PURPOSES[reached.measure].higher_is_better


def export_at_strength(
    folder: RunDirectory,
    recipe: Recipe,
    arm: Arm,
    out: Path,
    *,
    strength: float,
    target: tuple[str, float] | None = None,
    overwrite: bool = False,
) -> ScaledAdapter:
    """Write the adapter of an arm at a strength as a plain PEFT adapter, certified like the arm's own.

    Args:
        folder: the run.
        recipe: its recipe.
        arm: whose adapter.
        out: the directory to write; see `scale_adapter`.
        strength: what the adapter's update is multiplied by.
        target: the purpose and value that it was chosen for, for the record.
        overwrite: replace an adapter that this function wrote.
    """
    selection = folder.load_selection(arm, folder.load_map())
    made = folder.load_adapter(arm, selection)
    model, _ = load_model(recipe)
    return scale_adapter(
        model,
        arm.adapter,
        made.trained(selection) if isinstance(made, TuneResult) else selection,
        out,
        strength=strength,
        name=f"{arm.name} of {folder.path.absolute().name}",
        target=None if target is None else {"purpose": target[0], "value": target[1]},
        overwrite=overwrite,
    )
