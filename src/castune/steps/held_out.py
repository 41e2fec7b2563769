"""What is measured is kept apart from what is trained on: suites that hold training prompts are refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from castune.artifacts import TuneResult
from castune.artifacts.records import DataRecord
from castune.config import EvaluateConfig, Recipe, TuneConfig
from castune.data.example import Example, content_hash
from castune.data.overlap import shared_examples
from castune.errors import CastuneError, DataError
from castune.evaluation.suites import Suite
from castune.names import ArmName
from castune.steps.arms import training_configs
from castune.steps.directory import RunDirectory
from castune.steps.inputs import TrainingData, load_calibration, load_training, recorded_data

logger = logging.getLogger(__name__)


def require_held_out(
    config: EvaluateConfig,
    suites: Sequence[Suite],
    *,
    trained_on: Mapping[str, Sequence[Example]],
    calibration: Mapping[str, Sequence[Example]],
) -> None:
    """Refuse suites that hold prompts of the training data; tell of those that hold prompts of the calibration data.

    Calibration decides which heads are trained and fits no weight, so what it shares with a suite is told, not refused.

    Args:
        config: settings of the evaluation.
        suites: what is measured.
        trained_on: D_align and whatever else weights follow; by what it is called.
        calibration: D_safe, and D_util by its domains; by what they are called.

    Raises:
        DataError: a suite holds training prompts, and `config.overlap` does not allow it.
    """
    for suite in suites:
        for name, held in trained_on.items():
            if not (shared := shared_examples(held, suite.examples)):
                continue
            words = (
                f"{suite.name}: {len(shared)} of {len(suite.examples)} prompts are also in the {name} data (the first "
                f"is {shared[0]!r}), so it would measure memorisation"
            )
            if config.overlap != "allow":
                raise DataError(
                    f'{words}. Train without them (evaluate.overlap = "drop", or castune tune --held-out '
                    f'{suite.name}), or measure it anyway (evaluate.overlap = "allow", or castune evaluate '
                    "--allow-overlap)"
                )
            logger.warning("%s", words)
        for name, held in calibration.items():
            if shared := shared_examples(held, suite.examples):
                logger.warning(
                    "%s: %d of %d prompts are also in the %s data, which heads are chosen by",
                    suite.name,
                    len(shared),
                    len(suite.examples),
                    name,
                )


def check_held_out(
    recipe: Recipe, suites: Sequence[Suite], *, arms: Sequence[str] = (), folder: RunDirectory | None = None
) -> None:
    """`require_held_out` with the data of a recipe, its arms, and every adapter in `folder`, as they are now.

    Data that cannot be read any more are named in a warning.
    """
    try:
        calibration = load_calibration(recipe)
        training = load_training(recipe, suites, calibration)
    except DataError as error:
        logger.warning("cannot compare the suites with the training data: %s", error)
        return
    trained_on = trained_on_by(recipe, map(ArmName.parse, arms), training)
    known = {content_hash(examples) for examples in trained_on.values()}
    for arm in folder.arms() if folder is not None else ():
        for record in _records_of(TuneResult.load(arm.adapter)) if arm.is_trained else ():
            if record["hash"] in known:
                continue
            name = f"training (arm {arm.name}, {record['source']})"
            try:
                trained_on[name] = recorded_data(record, recipe.seed)
            except CastuneError as error:
                logger.warning("cannot compare the suites with the training data of arm %s: %s", arm.name, error)
    require_held_out(recipe.evaluate, suites, trained_on=trained_on, calibration=calibration.by_name)


def trained_on_by(recipe: Recipe, names: Iterable[ArmName], training: TrainingData) -> dict[str, Sequence[Example]]:
    """What weights follow in these trainings: D_align, and D_util with data replay or most kinds of surgery."""
    found: dict[str, Sequence[Example]] = {"training": training.align}
    if training.utility and any(config.trains_on_utility for config in training_configs(recipe, names)):
        found["utility (which is trained on)"] = training.utility
    return found


def _records_of(result: TuneResult) -> list[DataRecord]:
    """Records of the data that the weights of a finished training followed."""
    follows_utility = result.utility is not None and TuneConfig(**result.settings).trains_on_utility
    return [result.data, *([result.utility] if result.utility is not None and follows_utility else [])]
