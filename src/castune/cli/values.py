"""Values that are typed with commas between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from castune.errors import CastuneError

Number = TypeVar("Number", int, float)


def names(text: str) -> tuple[str, ...]:
    """Names between commas, without spaces around them and without empty ones."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str, option: str, kind: Callable[[str], Number], example: str) -> tuple[Number, ...]:
    """Numbers between commas.

    Raises:
        CastuneError: something else; the message names the option and shows the example.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise CastuneError(f"{option} {text}: expected numbers separated by commas, for example {example}") from None


def shares(text: str, option: str) -> dict[str, float]:
    """Numbers by the names they belong to, `name=number`, between commas.

    Raises:
        CastuneError: something else, or a name twice; the message names the option and shows an example.
    """
    pairs = [one.rpartition("=") for one in names(text)]
    try:
        found = {name.strip(): float(number) for name, _, number in pairs}
    except ValueError:
        found = {}
    if len(found) < len(pairs) or "" in found:
        raise CastuneError(
            f"{option} {text}: expected a share for each of several values, for example harmful=0.5,benign=0.5"
        )
    return found
