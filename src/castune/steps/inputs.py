"""The data of a run, as its recipe names them: loaded, and checked for what they are used for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from castune.artifacts.records import DataRecord
from castune.config import DataConfig, Recipe
from castune.data.example import Example, require_replies
from castune.data.overlap import shared_examples
from castune.data.sources import examples
from castune.diagnosis.domains import Utility, checked_sets, utility_sets
from castune.errors import ArtifactError, DataError
from castune.evaluation.suites import Suite, load_suites

logger = logging.getLogger(__name__)


def load_data(config: DataConfig, seed: int, read: Callable[..., list[Example]] = examples) -> list[Example]:
    """The examples of a recipe's data entry; `read` is called as `examples` is."""
    return read(config.source, limit=config.limit, seed=seed, balance=config.balance, shares=config.shares)


class Calibration(NamedTuple):
    """D_safe and D_util: what heads are measured on."""

    safety: list[Example]
    utility: Utility

    @property
    def by_name(self) -> dict[str, Sequence[Example]]:
        """D_safe, and D_util by its domains, by what messages call them."""
        return {"safety": self.safety, **{one.objective: one.examples for one in utility_sets(self.utility)}}

    @property
    def all_utility(self) -> list[Example]:
        """The examples of all utility domains together, in the order of the domains' names."""
        return [example for one in utility_sets(self.utility) for example in one.examples]


@dataclass(frozen=True)
class TrainingData:
    """What an arm is trained on.

    Attributes:
        align: the examples of D_align.
        source: where they came from, for the record.
        left_out: ids of what of the source is not among them, because a suite holds it.
        utility: for gradient surgery, data replay and null spaces.
        utility_source: where these came from.
    """

    align: Sequence[Example]
    source: DataConfig
    left_out: Sequence[str] = ()
    utility: Sequence[Example] | None = None
    utility_source: str | None = None


@dataclass(frozen=True)
class Inputs:
    """All data of a run: what heads are measured on, what is trained on, what is evaluated on."""

    calibration: Calibration
    training: TrainingData
    suites: list[Suite]


def load_inputs(recipe: Recipe) -> Inputs:
    """The data of a recipe, each checked for what it is used for.

    Raises:
        CastuneError: data that are not there, or not of the kind that is needed.
    """
    calibration = load_calibration(recipe)
    suites = load_suites(recipe.evaluate.suites, limit=recipe.evaluate.limit, seed=recipe.evaluate.seed)
    return Inputs(calibration, load_training(recipe, suites, calibration), suites)


def load_calibration(recipe: Recipe, read: Callable[..., list[Example]] = examples) -> Calibration:
    """D_safe and D_util of a recipe, checked for what a diagnosis needs; D_util by domain where it has domains."""
    safety, utility = load_data(recipe.safety, recipe.seed, read), _load_utility(recipe, read)
    require_replies(safety, "safety", "prompt, target")
    checked_sets(utility, recipe.diagnose)
    return Calibration(safety, utility)


def _load_utility(recipe: Recipe, read: Callable[..., list[Example]]) -> Utility:
    if isinstance(recipe.utility, DataConfig):
        return load_data(recipe.utility, recipe.seed, read)
    domains = {}
    for name, config in recipe.utility.items():
        try:
            domains[name] = load_data(config, recipe.seed, read)
        except DataError as error:
            raise DataError(f"utility: domain {name!r}: {error}") from error
    return domains


def load_training(recipe: Recipe, suites: Sequence[Suite], calibration: Calibration | None = None) -> TrainingData:
    """D_align of a recipe, and with `calibration` the utility data that trainings compare with or mix in.

    What the suites hold is left out of both where `evaluate.overlap` says so.
    """
    drops = recipe.evaluate.overlap == "drop"
    align = load_data(recipe.align, recipe.seed)
    require_replies(align, "align", "prompt, completion")
    align, left_out = without_held_out("align", align, suites) if drops else (align, [])
    if calibration is None:
        return TrainingData(align, recipe.align, left_out)
    utility = calibration.all_utility
    if drops:
        utility, _ = without_held_out("utility", utility, suites)
    return TrainingData(align, recipe.align, left_out, utility, _utility_source(recipe))


def _utility_source(recipe: Recipe) -> str:
    """The sources of a recipe's utility data, in the order of `all_utility`."""
    if isinstance(recipe.utility, DataConfig):
        return recipe.utility.source
    return ", ".join(recipe.utility[name].source for name in sorted(recipe.utility))


def recorded_data(record: DataRecord, seed: int) -> list[Example]:
    """The examples of a data record: all of the source, or as many as were drawn then, by the same seed; without what
    was left out.

    Raises:
        CastuneError: the source is not known, or not there any more.
    """
    if record["source"] is None:
        raise ArtifactError("data that were passed as examples, without a source, cannot be loaded again")
    left_out = set(record.get("left_out", ()))
    found = load_data(DataConfig(source=record["source"]), seed)
    n = record["n"] + len(left_out)
    if len(found) > n:
        drawn = DataConfig(source=record["source"], limit=n, balance=record.get("balance"), shares=record.get("shares"))
        found = load_data(drawn, seed)
    return [example for example in found if example.id not in left_out]


def without_held_out(
    what: str, examples: Sequence[Example], suites: Sequence[Suite]
) -> tuple[list[Example], list[str]]:
    """Training examples without those whose prompt is in a suite, and the ids of these; a warning counts them.

    Raises:
        DataError: nothing would be left.
    """
    shared = {identifier for suite in suites for identifier in shared_examples(suite.examples, examples)}
    kept = [example for example in examples if example.id not in shared]
    if not kept:
        raise DataError(f"{what}: all {len(examples)} prompts are also in the suites; nothing is left to train on")
    if shared:
        logger.warning("%s: dropped %d of %d examples that are also in the suites", what, len(shared), len(examples))
    return kept, [example.id for example in examples if example.id in shared]
