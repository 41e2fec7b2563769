"""Settings of a run: what a command in a run directory takes where nothing was typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from castune.config import DataConfig
from castune.config.base import Config
from castune.console import say

C = TypeVar("C", bound=Config)


def settings_of_run(config: C, typed: Mapping[str, Any]) -> C:
    """The settings of a run's stage with those that were typed; says which of the run's own are no defaults.

    Raises:
        CastuneError: a value that is not accepted, or that does not go with the run's own.
    """
    given = {name: getattr(config, name) for name in type(config).model_fields}
    kept = {
        name: value
        for name, value in given.items()
        if name not in typed and value != type(config).model_fields[name].get_default()
    }
    if kept:
        say(f"As in this run: {', '.join(f'{name} {_shown(value)}' for name, value in kept.items())}")
    return type(config)(**{**given, **typed})


def data_of_run(data: DataConfig, typed: Mapping[str, Any]) -> DataConfig:
    """A run's data source, drawn as was typed; or the source that was typed, of which the run says nothing."""
    if "source" in typed:
        return DataConfig(**typed)
    return settings_of_run(data, typed)


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
