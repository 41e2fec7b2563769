"""The adapters of a run, an arm at a time."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from castune.artifacts import HeadSelection, TuneResult
from castune.artifacts.files import alone_at
from castune.config import DataConfig, Recipe, TuneConfig
from castune.core.loading import LoadedModel, load_model
from castune.core.provenance import fingerprint
from castune.core.shards import Shard
from castune.data.example import content_hash
from castune.errors import ArtifactError, CastuneError
from castune.evaluation.suites import load_suites
from castune.names import ArmName
from castune.selection import require_rule
from castune.steps.arm import Arm
from castune.steps.diagnose import diagnose_step
from castune.steps.directory import RunDirectory
from castune.steps.inputs import TrainingData, load_calibration, load_data, without_held_out
from castune.steps.readiness import require_ready, training_tokens
from castune.steps.remeasure import Remeasure, require_query_heads
from castune.steps.same import check_same, check_template
from castune.steps.select import select_arm
from castune.tuning.phases import Reselect
from castune.tuning.rows import require_extras, require_utility
from castune.tuning.train import tune
from castune.tuning.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def tune_step(
    folder: RunDirectory,
    arm: Arm,
    loaded: LoadedModel,
    data: TrainingData,
    config: TuneConfig,
    *,
    overwrite: bool = False,
) -> TuneResult:
    """The adapter of an arm, trained unless it is there."""
    # The first of several processes speaks for them. It cannot wait: they would begin without it.
    lock = alone_at(arm.folder / ".adapter.lock", wait=Shard.n_processes() == 1)
    with lock if Shard.is_main_process() else nullcontext():
        selection = folder.load_selection(arm, folder.load_map(fingerprint(loaded.model)))
        if arm.is_made_of_others:
            raise ArtifactError(
                f"{arm.adapter} was made from other adapters, not trained here; train an arm with another name"
            )
        if arm.is_trained and not overwrite:
            return _stored_training(folder, arm, selection, loaded.tokenizer, data, config)
        reselect = None
        if config.reselect_steps is not None:
            require_rule(selection.zone)
            reselect = _reselection(folder, arm, selection, loaded)
        logger.info("tuning %s: %s, %d examples", arm.name, selection.counted, len(data.align))
        result = tune(
            *loaded,
            selection,
            data=data.align,
            out=arm.adapter,
            config=config,
            source=data.source.source,
            balance=data.source.balance,
            shares=data.source.shares,
            left_out=data.left_out,
            utility=data.utility,
            utility_source=data.utility_source,
            reselect=reselect,
            run_name=f"{folder.path.absolute().name}/{arm.name}",
        )
        if Shard.is_main_process():
            folder.record_step(f"tune {arm.name}", result.provenance)
        return result


def _stored_training(
    folder: RunDirectory,
    arm: Arm,
    selection: HeadSelection,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    config: TuneConfig,
) -> TuneResult:
    """The training that is there; refused where it was another one."""
    result = folder.load_tuning(arm, selection)
    # A record that knows nothing of a setting was made before there was a choice, with what is the default now.
    check_same(f"{arm.adapter}", TuneConfig(**result.settings).record(), config.record(), folder)
    check_same(f"{arm.adapter}'s data", result.data["hash"], content_hash(data.align), folder)
    if result.utility is not None and data.utility is not None:
        check_same(f"{arm.adapter}'s utility data", result.utility["hash"], content_hash(data.utility), folder)
    check_template(f"{arm.adapter}", result.model, tokenizer, folder)
    logger.info("tuning %s: already done", arm.name)
    if Shard.is_main_process():  # it was killed when its adapter was in place
        Workspace.beside(arm.adapter).remove_of(result.settings, result.data)
    return result


def _reselection(folder: RunDirectory, arm: Arm, selection: HeadSelection, loaded: LoadedModel) -> Reselect:
    """How the heads of an arm are chosen again: from the run's map, measured again on the model as it is then."""
    recipe = folder.load_recipe()
    require_query_heads(folder.load_map(), f"{folder.path}: reselect_steps works")
    calibration = load_calibration(recipe)
    # It is there: this compares model, data and settings with it.
    first = diagnose_step(folder, recipe, loaded, calibration)
    return partial(Remeasure(loaded, calibration, recipe, first, arm.name).select, selection)


def tune_arm(
    folder: RunDirectory,
    arm: str | None,
    config: TuneConfig,
    *,
    align: DataConfig,
    utility: Sequence[DataConfig] = (),
    held_out: Sequence[str] = (),
    typed: Collection[str] = (),
    overwrite: bool = False,
) -> tuple[Arm, TuneResult]:
    """Train an arm of a run by its name, the main one for None; its selection is made where there is none.

    What the name changes is applied to `config`, but not against a setting that was `typed`. The run's recipe notes how
    its main arm was trained. Examples whose prompts are in the suites `held_out` are not trained on; without such
    suites those that the run's main arm left out of the same data, or that are in the recipe's suites where it drops
    what overlaps.

    Raises:
        CastuneError: name and settings contradict each other, utility data is missing or not used. Nothing has been
            loaded or written then.
    """
    recipe = folder.load_recipe()
    is_there = arm is not None and folder.has_arm(arm)
    # A selection made by other means may have any name.
    name = ArmName.parse(arm) if arm is not None and (ArmName.is_name(arm) or not is_there) else None
    if name is not None:
        config = _changed(config, name, str(arm), recipe.tune, typed)
    if utility and not config.needs_utility:
        raise CastuneError(
            "--utility has no effect without gradient surgery, data replay or a null space: add --surgery, for example "
            "pcgrad, --replay or --null-space"
        )
    require_utility(config, utility)
    require_extras(config)
    if config.reselect_steps is not None:
        chosen = None if name is not None and not is_there else HeadSelection.load(folder.arm(arm).folder)
        require_rule(chosen.zone if chosen else (name and name.zone) or "bucket")
        require_query_heads(folder.load_map(), f"{folder.path}: reselect_steps works")
    data = _asked_data(folder, recipe, align, utility, held_out)
    if name is None or is_there:
        target = folder.arm(arm)
    else:
        seed = config.seed if recipe.select.seed is None else recipe.select.seed
        target = select_arm(folder, name, recipe.select.model_copy(update={"seed": seed}), folder.load_map())
    loaded = load_model(recipe, config.quantization)
    require_ready(loaded, training_tokens(loaded.tokenizer, [config], data.align))
    result = tune_step(folder, target, loaded, data, config, overwrite=overwrite)
    if target.folder == folder.path and Shard.is_main_process():
        folder.save_recipe(Recipe(**{**dict(recipe), "align": align, "tune": config}))
    return target, result


def _changed(config: TuneConfig, name: ArmName, text: str, of_run: TuneConfig, typed: Collection[str]) -> TuneConfig:
    """The settings with what the arm's name changes, be it the run's own."""
    for key, value in name.changes:
        free = (TuneConfig.model_fields[key].default, getattr(of_run, key))
        if getattr(config, key) != value and (key in typed or getattr(config, key) not in free):
            option = f"--{key.replace('_', '-')} {getattr(config, key)}"
            raise CastuneError(f"--arm {text} and {option} contradict each other: use one of them")
    return config.changed(**dict(name.changes))


def _asked_data(
    folder: RunDirectory,
    recipe: Recipe,
    align: DataConfig,
    utility: Sequence[DataConfig],
    held_out: Sequence[str],
) -> TrainingData:
    """The data that are named, without what the suites hold, or what the main arm left out of the same data."""
    examples = load_data(align, recipe.seed)
    utility_examples = [example for one in utility for example in load_data(one, recipe.seed)]
    left_out: list[str] = []
    main = folder.main_selection()
    if not held_out and align == recipe.align and main is not None and folder.main_arm(main).is_trained:
        # Suites may be others by now, and arms are to differ in their heads alone.
        left_out = list(TuneResult.load(folder.main_arm(main).adapter).data.get("left_out", ()))
        examples = [example for example in examples if example.id not in set(left_out)]
    if not held_out and not left_out and recipe.evaluate.overlap == "drop":
        held_out = recipe.evaluate.suites
    if held_out:
        suites = load_suites(held_out, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
        examples, left_out = without_held_out("training data", examples, suites)
        if utility_examples:
            utility_examples, _ = without_held_out("utility", utility_examples, suites)
    return TrainingData(examples, align, left_out, utility_examples, ", ".join(one.source for one in utility))
