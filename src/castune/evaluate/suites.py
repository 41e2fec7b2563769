"""Suites: a data source and what it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from castune.data.example import Example
from castune.data.sources import examples, purpose_of
from castune.errors import DataError

PURPOSES = ("utility", "safety", "over-refusal")


@dataclass(frozen=True)
class Suite:
    """Examples with one purpose.

    `utility`: multiple-choice questions, accuracy. `safety`: harmful prompts, refusal rate. `over-refusal`: benign
    prompts, refusal rate.
    """

    name: str
    purpose: str
    examples: tuple[Example, ...]


def load_suite(source: str, *, limit: int | None = None, seed: int = 0) -> Suite:
    """A suite from a data source.

    Args:
        source: a named source, or `purpose:path` for own data, for example `over-refusal:benign.jsonl`. A source of
            multiple-choice questions needs no purpose.
        limit: examples to draw; the subset depends on `seed` alone.
        seed: seed of the subset.

    Raises:
        DataError: see `examples`; or the purpose is unknown or does not fit the data.
    """
    prefix, _, rest = source.partition(":")
    purpose, path = (prefix, rest) if prefix in PURPOSES else (purpose_of(source), source)
    found = examples(path, limit=limit, seed=seed)
    questions = sum(example.is_question for example in found)
    if purpose is None and questions == len(found):
        purpose = "utility"
    if purpose not in PURPOSES:
        raise DataError(f"{source}: say what it measures, as PURPOSE:{path} with one of {', '.join(PURPOSES)}")
    if purpose == "utility" and questions < len(found):
        raise DataError(f"{source}: utility suites hold multiple-choice questions: prompt, choices, answer")
    if purpose != "utility" and questions:
        raise DataError(f"{source}: {purpose} suites hold prompts, found multiple-choice questions")
    return Suite(path.partition("=")[0] if purpose_of(path) else path, purpose, tuple(found))


def load_suites(sources: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Suite]:
    """All suites, loaded before anything is computed, so that a bad source fails at once."""
    return [load_suite(source, limit=limit, seed=seed) for source in sources]
