"""What a unit of a study does, in whatever process it is done, and whether it is done: the steps of a run, on shared
run directories.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from castune.artifacts import EvalResult, TuneResult
from castune.artifacts.conflict_map import DOMAINS_FOLDER, MAP_FILE
from castune.artifacts.drift_result import DRIFT_FILE
from castune.artifacts.eval_result import METRICS_FILE, SAMPLES_FILE
from castune.artifacts.files import locked, replacing
from castune.artifacts.fingerprints import at_strength
from castune.artifacts.records import ModelRecord
from castune.artifacts.samples import references_of
from castune.artifacts.tune_result import adapter_hash
from castune.config import Recipe, TuneConfig
from castune.core.loading import LoadedModel, load_model
from castune.diagnosis.stored import GRADIENTS_FILE, OUTCOMES_FILE
from castune.errors import CastuneError, MapUnfinished
from castune.evaluation.suites import Suite, load_suites
from castune.names import ArmName
from castune.steps.diagnose import diagnose_step, rerank_step
from castune.steps.directory import BASE, RunDirectory
from castune.steps.drift import drift_step
from castune.steps.evaluate import evaluate_step, identity_by_map, judge_step, stored_evaluation
from castune.steps.inputs import Calibration, TrainingData, load_calibration, load_training
from castune.steps.readiness import require_ready, suite_tokens, training_tokens
from castune.steps.select import select_arm
from castune.steps.tune import tune_step
from castune.study.graph import WorkUnit

logger = logging.getLogger(__name__)

References = dict[str, list[list[int]]]

# What lies beside a map and is needed to tell its noise from drift.
_OF_MAP = (OUTCOMES_FILE, GRADIENTS_FILE)


def perform(unit: WorkUnit) -> None:
    """Do a unit; what it has done already is kept, also from an attempt that died.

    Raises:
        CastuneError: bad data, model or settings, or an artifact that does not fit.
    """
    {
        "diagnose": _diagnose,
        "base": _evaluate_base,
        "tune": _tune,
        "evaluate": _evaluate,
        "judge": _judge,
        "drift": _drift,
    }[unit.stage](unit)


def is_done(unit: WorkUnit, suites: Sequence[Suite]) -> bool:
    """Whether the result of a unit is there; what cannot be told, for a file is missing or damaged, is not done.

    The unit then makes it again, or fails with what is wrong, and the study goes on.
    """
    try:
        return _is_done(unit, suites)
    except (CastuneError, OSError) as error:
        logger.warning("%s: %s", unit.name, error)
        return False


def _is_done(unit: WorkUnit, suites: Sequence[Suite]) -> bool:
    """Whether the result of a unit is there, told from files alone: no model is loaded for it.

    Diagnoses and trainings lie in directories whose names are digests of what they were made from. An evaluation must
    be of these suites and settings, and of the adapter that is there, at all its strengths. Judging is always asked
    for: it finds itself whether there is something to do.
    """
    folder = RunDirectory(unit.folder)
    if unit.stage == "diagnose":
        return folder.map_file.is_file()
    if unit.stage == "tune":
        assert unit.arm is not None
        arm = folder.side_arm(unit.arm)
        if not (arm.is_trained and arm.selection_file.is_file()):
            return False
        wanted = unit.recipe.tune.changed(**dict(ArmName.parse(unit.arm).changes))
        # If not, the unit says what differs.
        return TuneConfig(**TuneResult.load(arm.adapter).settings).record() == wanted.record()
    if unit.stage == "base":
        found = _stored(folder, unit.recipe, BASE, suites, None)
        # It may have been killed before its replies were judged.
        return found is not None and found.settings["judge"] == unit.recipe.evaluate.judge
    if unit.stage == "evaluate":
        assert unit.arm is not None
        adapter = adapter_hash(folder.side_arm(unit.arm).adapter)
        references = _references(unit, suites)
        return all(
            _stored(folder, unit.recipe, unit.arm, suites, adapter, strength, references) is not None
            for strength in unit.recipe.evaluate.strengths
        )
    if unit.stage == "drift":
        assert unit.arm is not None
        return (folder.drift(folder.side_arm(unit.arm)) / DRIFT_FILE).is_file()
    return False


def _references(unit: WorkUnit, suites: Sequence[Suite]) -> References:
    """What the base model replied, where suites are measured on it; nothing before it is evaluated."""
    base = RunDirectory(unit.base_folder)
    if not any(suite.about.against_base for suite in suites) or not base.is_evaluated(BASE):
        return {}
    return references_of(EvalResult.load(base.evaluation(BASE)).samples)


def _stored(
    folder: RunDirectory,
    recipe: Recipe,
    arm: str,
    suites: Sequence[Suite],
    adapter: str | None,
    strength: float = 1.0,
    references: References | None = None,
) -> EvalResult | None:
    if not folder.is_evaluated(arm, strength):
        return None
    model: ModelRecord = {**identity_by_map(folder, recipe), "adapter": adapter}
    return stored_evaluation(
        folder.at_strength(arm, strength), at_strength(model, strength), recipe.evaluate, suites, references
    )


def _diagnose(unit: WorkUnit) -> None:
    folder, recipe = RunDirectory(unit.folder), unit.recipe
    folder.save_recipe(recipe)
    if unit.map_folder != unit.folder:
        rerank_step(folder, recipe, RunDirectory(unit.map_folder))
        return
    loaded = _model(_loads(recipe))
    # What comes after the map is looked at before it.
    configs = [recipe.tune.changed(**dict(ArmName.parse(name).changes)) for name in recipe.study.main_arms]
    trained_on = training_tokens(loaded.tokenizer, configs, _training(_loads(recipe), False).align)
    require_ready(loaded, trained_on, suite_tokens(loaded.tokenizer, recipe.evaluate, _suites(recipe)))
    try:
        diagnose_step(folder, recipe, loaded, _calibration(_loads(recipe)), shard=unit.shard)
    except MapUnfinished:
        if unit.shard is None:
            raise


def _evaluate_base(unit: WorkUnit) -> None:
    evaluate_step(RunDirectory(unit.folder), unit.recipe, _suites(unit.recipe), _evaluated(unit.recipe))


def _tune(unit: WorkUnit) -> None:
    assert unit.arm is not None
    folder, recipe = _opened(unit), unit.recipe
    name = ArmName.parse(unit.arm)
    arm = select_arm(folder, name, recipe.select, folder.load_map())
    config = recipe.tune.changed(**dict(name.changes))
    loads = _loads(recipe)
    data = _training(loads, config.needs_utility)
    tune_step(folder, arm, _model(loads, config.quantization), data, config)


def _evaluate(unit: WorkUnit) -> None:
    folder = _opened(unit)
    evaluate_step(folder, unit.recipe, _suites(unit.recipe), _evaluated(unit.recipe), only=unit.arm)


def _judge(unit: WorkUnit) -> None:
    judge_step(_opened(unit), unit.recipe.evaluate.judge)


def _drift(unit: WorkUnit) -> None:
    drift_step(_opened(unit), unit.arm)


def _opened(unit: WorkUnit) -> RunDirectory:
    """The unit's run directory, with the map and the evaluation of the base model that it shares with others."""
    folder = RunDirectory(unit.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path):
        if not folder.recipe_file.is_file():
            folder.save_recipe(unit.recipe)
        base = RunDirectory(unit.base_folder).evaluation(BASE)
        # The map last of its files, metrics last of theirs: where these are, all are.
        parts = [*sorted((unit.map_folder / DOMAINS_FOLDER).glob("*.parquet"))]
        parts += [path for name in _OF_MAP if (path := unit.map_folder / name).is_file()]
        shared = [*parts, unit.map_folder / MAP_FILE]
        for file in shared:
            _share(file, folder.path / file.relative_to(unit.map_folder))
        if (base / METRICS_FILE).is_file():
            EvalResult.settle(base)
            with locked(base, shared=True):
                for name in (SAMPLES_FILE, METRICS_FILE):
                    _share(base / name, folder.evaluation(BASE) / name, private=name == SAMPLES_FILE)
    return folder


def _share(source: Path, target: Path, *, private: bool = False) -> None:
    """The same file at another place too; whoever writes there replaces it and leaves the source as it is."""
    if target.exists() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    with replacing(target, private=private) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)


# A worker does many units of the same study: models and data stay loaded from one to the next.


def _loads(recipe: Recipe) -> str:
    """What is loaded for a recipe, whatever its arms and settings, as a key."""
    keys = {
        "model",
        "revision",
        "trust_remote_code",
        "template_date",
        "dtype",
        "device",
        "seed",
        "safety",
        "utility",
        "align",
    }
    # What is trained on depends on the suites where it is not to overlap with them.
    keys |= {"evaluate"} if recipe.evaluate.overlap == "drop" else set()
    return recipe.model_copy(update={"out": ""}).model_dump_json(include=keys | {"out"})


def _evaluated(recipe: Recipe) -> LoadedModel | None:
    return _model(_loads(recipe)) if recipe.evaluate.backend == "hf" else None


@lru_cache(maxsize=1)
def _model(loads: str, quantization: str = "none") -> LoadedModel:
    return load_model(Recipe.model_validate_json(loads), quantization)


@lru_cache(maxsize=2)
def _calibration(loads: str) -> Calibration:
    return load_calibration(Recipe.model_validate_json(loads))


@lru_cache(maxsize=2)
def _training(loads: str, with_utility: bool) -> TrainingData:
    recipe = Recipe.model_validate_json(loads)
    suites = _suites(recipe) if recipe.evaluate.overlap == "drop" else ()
    return load_training(recipe, suites, _calibration(loads) if with_utility else None)


def _suites(recipe: Recipe) -> tuple[Suite, ...]:
    config = recipe.evaluate
    return _loaded_suites(config.suites, config.limit, config.seed)


@lru_cache(maxsize=1)
def _loaded_suites(names: tuple[str, ...], limit: int | None, seed: int) -> tuple[Suite, ...]:
    return tuple(load_suites(names, limit=limit, seed=seed))
