"""The arms that a recipe asks for, and how each is trained."""

from __future__ import annotations

from collections.abc import Iterable

from castune.config import Recipe, TuneConfig
from castune.errors import CastuneError
from castune.names import ArmName
from castune.selection import require_rule
from castune.tuning.rows import require_extras


def planned_arms(recipe: Recipe) -> list[ArmName]:
    """The main arm and those it is compared with."""
    main = ArmName(None if recipe.select.buckets else recipe.select.zone)
    return [main, *map(ArmName.parse, recipe.select.compare)]


def training_configs(recipe: Recipe, names: Iterable[ArmName]) -> list[TuneConfig]:
    """Settings of the recipe's own training and of those of the arms, whose names change some."""
    return [recipe.tune, *(recipe.tune.changed(**dict(name.changes)) for name in names)]


def require_trainable(recipe: Recipe, names: Iterable[ArmName]) -> None:
    """Refuse arms that need what is not there, or are to be selected again and cannot: before anything is loaded.

    Raises:
        CastuneError: the message says what to install or to leave out.
    """
    for name in names:
        config = recipe.tune.changed(**dict(name.changes))
        require_extras(config)
        if config.reselect_steps is not None:
            require_rule(name.zone or "bucket")
    if recipe.tune.reselect_steps is not None and recipe.diagnose.units != ("q_heads",):
        raise CastuneError(
            f"tune.reselect_steps works with query heads only; diagnose.units is {', '.join(recipe.diagnose.units)}"
        )
