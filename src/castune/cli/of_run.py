"""Settings of a run: what a command in a run directory takes where nothing was typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from castune.config import DataConfig, Recipe
from castune.config.base import Config
from castune.console import say

C = TypeVar("C", bound=Config)


def settings_of_run(config: C, typed: Mapping[str, Any], *, but: Collection[str] = ()) -> C:
    """The settings of a run's stage with those that were typed; says which of the run's own are no defaults.

    Args:
        config: the run's own.
        typed: by their keys.
        but: keys of which nothing is said, because something else decides on them.

    Raises:
        CastuneError: a value that is not accepted, or that does not go with the run's own.
    """
    given = {name: getattr(config, name) for name in type(config).model_fields}
    kept = {
        name: value
        for name, value in given.items()
        if name not in {*typed, *but} and value != type(config).model_fields[name].get_default()
    }
    # The first process speaks for all.
    from castune.core.shards import Shard

    if kept and Shard.is_main_process():
        say(f"As in this run: {' '.join(_as_typed(name, value) for name, value in kept.items())}")
    return type(config)(**{**given, **typed})


def data_of_run(data: DataConfig, typed: Mapping[str, Any]) -> DataConfig:
    """A run's data source, drawn as was typed; or the source that was typed, of which the run says nothing."""
    if "source" in typed:
        return DataConfig(**typed)
    is_default = data == Recipe.model_fields["align"].get_default()
    return settings_of_run(data, typed, but=("source",) if is_default else ())


def _as_typed(name: str, value: object) -> str:
    option = "data" if name == "source" else name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, Mapping):
        value = ",".join(f"{key}={share:g}" for key, share in value.items())
    return f"--{option} {value}"
