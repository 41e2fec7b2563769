"""What a model answers to the examples of a suite: in batches, each in the journal as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from castune.config import EvaluateConfig
from castune.core.journal import Journal
from castune.core.progress import Advance
from castune.evaluation.backend import Answer, Backend
from castune.evaluation.suites import Suite


@dataclass(frozen=True)
class Answers:
    """An answer an example, as plain JSON, and the seconds they took, those before an interruption included."""

    values: list[Answer]
    seconds: float


def answers(backend: Backend, suite: Suite, config: EvaluateConfig, journal: Journal, advance: Advance) -> Answers:
    """The answers of a backend to a suite (`Work.answer`); one that is missing is asked for again when continued."""
    key = f"{suite.purpose}:{suite.name}"
    known: dict[int, Answer] = {}
    seconds = 0.0
    for record in journal.records():
        if record.get("suite") == key:
            known.update(zip(record["examples"], record["answers"], strict=True))
            seconds += record["seconds"]
    work = backend.work(suite, config)
    for batch in work.batches:
        missing = [index for index in batch if index not in known]
        if missing:
            started = time.perf_counter()
            found = {
                index: answer for index, answer in zip(missing, work.answer(missing), strict=True) if answer is not None
            }
            took = time.perf_counter() - started
            journal.append(
                {"suite": key, "examples": list(found), "answers": list(found.values()), "seconds": round(took, 4)}
            )
            known.update(found)
            seconds += took
        advance(len(batch) * suite.cost(config))
    return Answers([known.get(index) for index in range(len(suite.examples))], seconds)


def finite(scores: Sequence[float | None] | None) -> np.ndarray | None:
    """The scores as an array; None where there are none, or one of them is not finite."""
    if scores is None or any(score is None for score in scores):
        return None
    return np.array(scores, dtype=float)


def with_references(
    backend: Backend,
    suite: Suite,
    config: EvaluateConfig,
    journal: Journal,
    known: Sequence[Sequence[int]] | None = None,
) -> Suite:
    """The suite with the base model's own replies where it is measured on them: known, in the journal, or generated."""
    if not suite.about.against_base:
        return suite
    key = f"{suite.purpose}:{suite.name}"
    for record in journal.records():
        if record.get("references_of") == key:
            return suite.with_references(record["tokens"])
    tokens = backend.references(suite, config) if known is None else list(known)
    journal.append({"references_of": key, "tokens": [list(reply) for reply in tokens]})
    return suite.with_references(tokens)
