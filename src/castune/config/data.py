"""A data source and how much of it, or several by the names of their domains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from castune.config.base import Config, Count
from castune.errors import CastuneError


class DataConfig(Config):
    """A data source and how much of it. A plain string is a source without a limit."""

    source: str
    """A named source, `name=path`, a file, or a hub id."""
    limit: Count | None = None
    """Number of examples to draw, with the recipe's seed. All by default."""
    balance: str | None = None
    """Column to balance on: draws equally many examples for each of its values, or follows `shares`."""
    shares: Annotated[dict[str, Annotated[float, Field(gt=0, strict=True)]], Field(min_length=1)] | None = None
    """Share of each listed value of the column in `balance` (by default `kind`). Only proportions count: 2, 1, 1 is the
    same as 0.5, 0.25, 0.25. Values that are not listed are not drawn."""


def plain_source(value: object) -> Any:
    """A source as a string stands for a table that holds nothing else."""
    return {"source": value} if isinstance(value, str) else value


def _data(value: object) -> DataConfig:
    value = plain_source(value)
    if isinstance(value, DataConfig):
        return value
    if not isinstance(value, Mapping):
        raise CastuneError("accepted: a source, or a table with the keys source, limit, balance and shares")
    return DataConfig(**value)


def check_domain_names(names: Iterable[str]) -> None:
    """Refuse names of utility domains that could not be file names and keys of a recipe beside each other.

    Raises:
        CastuneError: the message names the first such name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            raise CastuneError(f"domain {name!r}: accepted: 1 to 100 letters (a to z, A to Z), digits, - and _")
        if name in DataConfig.model_fields:
            raise CastuneError(f"domain {name!r}: this is a key of a data source, and a domain needs another name")
        # Some file systems do not tell capitals from small letters.
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise CastuneError(f"domains {other!r} and {name!r} differ in capitals only; rename one of them")


def data_or_domains(value: object) -> DataConfig | dict[str, DataConfig]:
    """One set, or several by the names of their domains."""
    if not isinstance(value, Mapping) or "source" in value or value.keys() <= DataConfig.model_fields.keys():
        return _data(value)
    check_domain_names(value)
    domains = {}
    for name, entry in value.items():
        try:
            domains[name] = _data(entry)
        except CastuneError as error:
            raise CastuneError(f"domain {name!r}: {error}") from None
    return domains
