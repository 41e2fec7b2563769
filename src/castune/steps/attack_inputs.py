"""What attacks are made with: arms, prompts, rows and strengths, all checked before a model is loaded."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from castune.artifacts.attack_result import KINDS, Attack
from castune.config import AttackConfig, DataConfig, EvaluateConfig, Recipe
from castune.core.devices import device_of
from castune.core.quantisation import why_not_in_4_bits
from castune.data.example import Example, require_replies
from castune.data.overlap import shared_examples
from castune.data.sources import examples
from castune.errors import ArtifactError, CastuneError, DataError
from castune.evaluation.suites import Suite, load_suites
from castune.steps.arm import Arm
from castune.steps.dial import require_adapter
from castune.steps.directory import RunDirectory
from castune.steps.equal_safety import EqualStrengths, strengths_at_equal_safety
from castune.steps.evaluate import require_evaluation
from castune.steps.held_out import check_held_out
from castune.steps.inputs import load_data

logger = logging.getLogger(__name__)

# What is compared with, where the run has it.
_REFERENCE = "all"
_BENIGN = DataConfig(source="starter-align", shares={"benign": 1.0})
# Prompts of each side that the refusal direction is made of; as many as Arditi et al. take.
_OF_DIRECTION = 128
_FEWEST_OF_DIRECTION = 2


@dataclass(frozen=True)
class AttackInputs:
    """Everything but the model.

    Attributes:
        arms: the arms, the reference first.
        equal: the strengths of their adapters.
        attacks: what is done to each of them.
        left_out: kinds of attack that cannot be made here, with the reason.
        suites: harmful prompts, on which refusals are counted.
        evaluate: settings by which.
        rows: what is relearnt on, the first n of them; those that arms were not trained on come first.
        seen: ids of those that they were.
        rows_source: where they are from.
        harmful: calibration prompts, of which the direction is made.
        harmless: the prompts of the rows.
    """

    arms: tuple[Arm, ...]
    equal: EqualStrengths
    attacks: tuple[Attack, ...]
    left_out: dict[str, str]
    suites: tuple[Suite, ...]
    evaluate: EvaluateConfig
    rows: tuple[Example, ...]
    seen: frozenset[str]
    rows_source: str
    harmful: tuple[Example, ...]
    harmless: tuple[Example, ...]


def attack_inputs(
    folder: RunDirectory,
    recipe: Recipe,
    config: AttackConfig,
    *,
    arms: Sequence[str] = (),
    rows: str | None = None,
    prompts: Sequence[str] = (),
) -> AttackInputs:
    """What the attacks of a command are made with.

    Args:
        folder: the run.
        recipe: its recipe.
        config: settings of the attacks.
        arms: names; all that have an adapter and were evaluated when empty.
        rows: source of the benign rows; the starter data's when absent.
        prompts: suites of harmful prompts; the run's when empty.

    Raises:
        CastuneError: the message names the option and says what is accepted.
    """
    chosen = _arms(folder, arms)
    attacks, left_out = _attacks(config, recipe)
    evaluate, suites = _suites(folder, recipe, config, prompts)
    kinds = {attack.kind for attack in attacks}
    benign: list[Example] = []
    seen: set[str] = set()
    if kinds & {"relearn", "direction"}:
        benign, seen = _rows(recipe, config, rows, suites)
    if "relearn" in kinds:
        require_replies(benign, "--rows", "prompt, completion")
        if max(config.n_rows) > len(benign):
            raise DataError(
                f"--n-rows {max(config.n_rows)}: {rows or _BENIGN.source} has {len(benign)} rows to relearn on; "
                "give fewer, or more rows with --rows"
            )
    harmful, harmless = _sides(recipe, benign, suites) if "direction" in kinds else ([], [])
    return AttackInputs(
        arms=chosen,
        equal=strengths_at_equal_safety(folder, [arm.name for arm in chosen]),
        attacks=attacks,
        left_out=left_out,
        suites=suites,
        evaluate=evaluate,
        rows=tuple(benign),
        seen=frozenset(seen),
        rows_source=rows or _BENIGN.source,
        harmful=tuple(harmful),
        harmless=tuple(harmless),
    )


def _arms(folder: RunDirectory, names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms asked for, the reference first."""
    if len(set(names)) < len(names):
        raise CastuneError(f"--arm: {next(name for name in names if names.count(name) > 1)} is named twice")
    if names:
        arms = [folder.arm(name) for name in names]
        for arm in arms:
            require_adapter(folder, arm)
            if not folder.is_evaluated(arm.name):
                raise ArtifactError(
                    f"{folder.path}: arm {arm.name} was not evaluated; run: castune evaluate {folder.path}"
                )
        return tuple(arms)
    arms = [arm for arm in folder.arms() if arm.has_adapter and folder.is_evaluated(arm.name)]
    if not arms:
        raise ArtifactError(
            f"{folder.path}: no arm has an adapter that was evaluated; run: castune tune {folder.path}, then "
            f"castune evaluate {folder.path}"
        )
    for arm in arms:
        require_adapter(folder, arm)
    return tuple(sorted(arms, key=lambda arm: arm.name != _REFERENCE))


def _attacks(config: AttackConfig, recipe: Recipe) -> tuple[tuple[Attack, ...], dict[str, str]]:
    """What is done, in the order of `KINDS`; kinds that were asked for by name must be possible."""
    asked = config.kinds or KINDS
    left_out: dict[str, str] = {}
    if "quantise" in asked and (reason := why_not_in_4_bits(device_of(recipe.device))) is not None:
        if config.kinds is not None:
            raise CastuneError(f"--kind quantise: {reason}")
        left_out["quantise"] = reason
    amounts: dict[str, tuple[float | None, ...]] = {"relearn": config.n_rows, "dial": config.strengths}
    found = [
        Attack(kind, amount)
        for kind in KINDS
        if kind in asked and kind not in left_out
        for amount in amounts.get(kind, (None,))
    ]
    return tuple(found), left_out


def _suites(
    folder: RunDirectory, recipe: Recipe, config: AttackConfig, prompts: Sequence[str]
) -> tuple[EvaluateConfig, tuple[Suite, ...]]:
    """Suites of harmful prompts, and the run's settings for them."""
    settings = recipe.evaluate.model_dump()
    settings |= {"backend": "hf", "served_model": None, "strengths": (1.0,)}
    settings |= {"limit": config.limit or recipe.evaluate.limit}
    if prompts:
        evaluate = EvaluateConfig(**{**settings, "suites": tuple(prompts)})
        suites = load_suites(evaluate.suites, limit=evaluate.limit, seed=evaluate.seed)
        if wrong := [suite for suite in suites if suite.purpose != "safety"]:
            raise DataError(
                f"--prompts: suite {wrong[0].name} measures {wrong[0].purpose}; refusals are counted on harmful "
                "prompts, such as starter-safety-eval or safety:harmful.jsonl"
            )
        check_held_out(Recipe(**{**dict(recipe), "evaluate": evaluate}), suites, folder=folder)
    else:
        every = load_suites(recipe.evaluate.suites, limit=settings["limit"], seed=recipe.evaluate.seed)
        both = [one for one in zip(recipe.evaluate.suites, every, strict=True) if one[1].purpose == "safety"]
        if not both:
            raise DataError(
                f"{folder.path}: the run counts refusals on no suite of harmful prompts; give one with --prompts, such "
                "as starter-safety-eval"
            )
        evaluate = EvaluateConfig(**{**settings, "suites": tuple(source for source, _ in both)})
        suites = [suite for _, suite in both]
    require_evaluation(evaluate, suites)
    return evaluate, tuple(suites)


def _rows(
    recipe: Recipe, config: AttackConfig, source: str | None, suites: Sequence[Suite]
) -> tuple[list[Example], set[str]]:
    """Benign rows in random order, those that arms were not trained on first, and ids of the others."""
    found = load_data(_BENIGN, 0) if source is None else examples(source)
    for suite in suites:
        if shared := shared_examples(suite.examples, found):
            raise DataError(
                f"--rows: {len(shared)} of {len(found)} prompts are also in suite {suite.name} (the first is "
                f"{shared[0]!r}), on which refusals are counted; give other rows"
            )
    random.Random(config.seed).shuffle(found)
    try:
        seen = set(shared_examples(load_data(recipe.align, recipe.seed), found))
    except DataError as error:
        logger.warning("cannot tell which rows the arms were trained on: %s", error)
        seen = set()
    return sorted(found, key=lambda row: row.id in seen), seen


def _sides(recipe: Recipe, benign: Sequence[Example], suites: Sequence[Suite]) -> tuple[list[Example], list[Example]]:
    """Harmful calibration prompts and harmless ones; none that is measured."""
    measured = [example for suite in suites for example in suite.examples]
    harmful = load_data(recipe.safety, recipe.seed)
    shared = set(shared_examples(measured, harmful))
    if shared:
        logger.warning(
            "safety: %d of %d prompts are measured, and left out of the direction", len(shared), len(harmful)
        )
    sides = [
        [replace(example, reply=None) for example in side if example.id not in shared][:_OF_DIRECTION]
        for side in (harmful, benign)
    ]
    for name, side in zip(("harmful", "harmless"), sides, strict=True):
        if len(side) < _FEWEST_OF_DIRECTION:
            raise DataError(
                f"the refusal direction is made of calibration prompts that are not measured, and {len(side)} {name} "
                f"ones are left; at least {_FEWEST_OF_DIRECTION} are needed"
            )
    return sides[0], sides[1]
