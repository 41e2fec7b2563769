"""The data of a run, as its recipe names them: loaded, checked, and kept apart from what is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from castune.artifacts import TuneResult
from castune.artifacts.records import DataRecord
from castune.config import DataConfig, EvaluateConfig, Recipe, TuneConfig
from castune.data.example import Example, content_hash, require_replies
from castune.data.overlap import shared_examples
from castune.data.sources import examples
from castune.diagnosis.domains import Utility, utility_sets
from castune.errors import ArtifactError, CastuneError, DataError
from castune.evaluation.suites import Suite
from castune.names import ArmName
from castune.steps.directory import RunDirectory

logger = logging.getLogger(__name__)


def load_data(config: DataConfig, seed: int, read: Callable[..., list[Example]] = examples) -> list[Example]:
    """The examples of a recipe's data entry; `read` is called as `examples` is."""
    return read(config.source, limit=config.limit, seed=seed, balance=config.balance)


def load_calibration(recipe: Recipe, read: Callable[..., list[Example]] = examples) -> tuple[list[Example], Utility]:
    """D_safe and D_util of a recipe, checked for what a diagnosis needs; D_util by domain where it has domains."""
    safety, utility = load_data(recipe.safety, recipe.seed, read), _load_utility(recipe, read)
    require_replies(safety, "safety", "prompt, target")
    utility_sets(utility)
    return safety, utility


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


def named_calibration(safety: Sequence[Example], utility: Utility) -> dict[str, Sequence[Example]]:
    """D_safe, and D_util by its domains, by what messages call them."""
    return {"safety": safety, **{one.objective: one.examples for one in utility_sets(utility)}}


def load_align(recipe: Recipe, suites: Sequence[Suite]) -> tuple[list[Example], list[str]]:
    """D_align of a recipe, checked, and the ids of what `evaluate.overlap` leaves out of it."""
    align = load_data(recipe.align, recipe.seed)
    require_replies(align, "align", "prompt, completion")
    return without_held_out("align", align, suites) if recipe.evaluate.overlap == "drop" else (align, [])


def load_trained_utility(recipe: Recipe, utility: Utility, suites: Sequence[Suite]) -> list[Example]:
    """The utility examples that trainings compare with or mix in, without what `evaluate.overlap` leaves out."""
    examples = all_examples(utility)
    return without_held_out("utility", examples, suites)[0] if recipe.evaluate.overlap == "drop" else examples


def all_examples(utility: Utility) -> list[Example]:
    """The examples of all utility domains together, in the order of the domains' names."""
    return [example for one in utility_sets(utility) for example in one.examples]


def utility_source(recipe: Recipe) -> str:
    """The sources of a recipe's utility data, in the order of `all_examples`."""
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
        raise ArtifactError("data that were given as examples, not by their source, cannot be loaded again")
    left_out = set(record.get("left_out", ()))
    found = load_data(DataConfig(source=record["source"]), seed)
    n = record["n"] + len(left_out)
    if len(found) > n:
        found = load_data(DataConfig(source=record["source"], limit=n, balance=record.get("balance")), seed)
    return [example for example in found if example.id not in left_out]


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
                f"{suite.name}: {len(shared)} of {len(suite.examples)} prompts are in the {name} data too, the first "
                f"is {shared[0]!r}: what is measured there is memory"
            )
            if config.overlap != "allow":
                raise DataError(
                    f'{words}. Train without them (evaluate.overlap = "drop", or castune tune --held-out '
                    f'{suite.name}), or measure them all the same (evaluate.overlap = "allow")'
                )
            logger.warning("%s", words)
        for name, held in calibration.items():
            if shared := shared_examples(held, suite.examples):
                logger.warning(
                    "%s: %d of %d prompts are in the %s data too, by which heads are chosen",
                    suite.name,
                    len(shared),
                    len(suite.examples),
                    name,
                )


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
        raise DataError(f"{what}: all of its {len(examples)} prompts are in the suites; nothing is left to train on")
    if shared:
        logger.warning("%s: %d of %d examples are left out, for the suites hold them", what, len(shared), len(examples))
    return kept, [example.id for example in examples if example.id in shared]


def check_held_out(
    recipe: Recipe, suites: Sequence[Suite], *, arms: Sequence[str] = (), folder: RunDirectory | None = None
) -> None:
    """`require_held_out` with the data of a recipe, its arms, and every adapter in `folder`, as they are now.

    Data that cannot be read any more are named in a warning.
    """
    try:
        (align, _), (safety, utility) = load_align(recipe, suites), load_calibration(recipe)
    except DataError as error:
        logger.warning("suites are not compared with the training data, which are not there: %s", error)
        return
    trained_on = trained_on_by(recipe, arms, align, load_trained_utility(recipe, utility, suites))
    known = {content_hash(examples) for examples in trained_on.values()}
    for arm in folder.arms() if folder is not None else ():
        for record in _records_of(TuneResult.load(arm.adapter)) if arm.is_trained else ():
            if record["hash"] in known:
                continue
            name = f"training (arm {arm.name}, {record['source']})"
            try:
                trained_on[name] = recorded_data(record, recipe.seed)
            except CastuneError as error:
                logger.warning("suites are not compared with what %s was trained on: %s", arm.name, error)
    require_held_out(recipe.evaluate, suites, trained_on=trained_on, calibration=named_calibration(safety, utility))


def trained_on_by(
    recipe: Recipe, arms: Sequence[str], align: Sequence[Example], utility: Sequence[Example]
) -> dict[str, Sequence[Example]]:
    """What weights follow in these trainings: D_align, and D_util with data replay or most kinds of surgery."""
    configs = [recipe.tune, *(recipe.tune.changed(**dict(ArmName.parse(name).changes)) for name in arms)]
    found: dict[str, Sequence[Example]] = {"training": align}
    if any(config.trains_on_utility for config in configs):
        found["utility (which is trained on)"] = utility
    return found


def _records_of(result: TuneResult) -> list[DataRecord]:
    """Records of the data that the weights of a finished training followed."""
    follows_utility = result.utility is not None and TuneConfig(**result.settings).trains_on_utility
    return [result.data, *([result.utility] if result.utility is not None and follows_utility else [])]
