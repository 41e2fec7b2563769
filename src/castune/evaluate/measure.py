"""What a model answers to the examples of a suite: in batches, each in the journal as soon as it is known.

Which examples make a batch depends on the suite alone, so that a run that was killed and continued measures what it
would have measured without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from castune.config import EvaluateConfig
from castune.core.generation import generate_replies
from castune.core.journal import Journal, nullable
from castune.core.losses import batches_by_length
from castune.core.progress import Advance
from castune.core.scoring import choice_scores, question_rows, score_rows, shared_if_exact
from castune.data.chat import ChatFormat
from castune.evaluate.suites import Suite

# A decoding step computes one token a row, so rows x length may be larger than in a forward over whole rows.
_DECODED = 4


@dataclass(frozen=True)
class Answers:
    """An answer an example, as plain JSON, and the seconds they took, those before an interruption included."""

    values: list[Any]
    seconds: float


def chosen(
    model: Any, chat: ChatFormat, suite: Suite, config: EvaluateConfig, journal: Journal, advance: Advance
) -> Answers:
    """Scores of the choices of every question: a list of floats an example, None where not finite."""
    rows_of = shared_if_exact(model, lambda share: [question_rows(chat, e, share_prompt=share) for e in suite.examples])

    def run(indices: Sequence[int]) -> list[Any]:
        rows = [row for index in indices for row in rows_of[index]]
        values = iter(score_rows(model, rows, batch_tokens=config.batch_tokens))
        return [
            nullable(choice_scores(chat, suite.examples[index], [next(values) for _ in rows_of[index]]).tolist())
            for index in indices
        ]

    lengths = [sum(len(row.ids) for row in rows) for rows in rows_of]
    return _answered(suite, batches_by_length(lengths, config.batch_tokens), run, journal, advance)


def replied(
    model: Any,
    tokenizer: Any,
    chat: ChatFormat,
    suite: Suite,
    config: EvaluateConfig,
    journal: Journal,
    advance: Advance,
) -> Answers:
    """Greedy replies to every prompt: `text`, `finished` and the number of `tokens`."""
    max_new_tokens = suite.reply_tokens(config)
    prompts = [chat.prompt_ids(example)[0] for example in suite.examples]
    batch_tokens = _DECODED * config.batch_tokens

    def run(indices: Sequence[int]) -> list[Any]:
        replies = generate_replies(
            model,
            tokenizer,
            [prompts[index] for index in indices],
            max_new_tokens=max_new_tokens,
            end_tokens=chat.end_tokens(model),
            batch_tokens=batch_tokens,
        )
        return [{"text": r.text, "finished": r.finished, "tokens": len(r.tokens)} for r in replies]

    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    return _answered(suite, batches_by_length(lengths, batch_tokens), run, journal, advance)


def _answered(
    suite: Suite,
    batches: Any,
    run: Callable[[Sequence[int]], list[Any]],
    journal: Journal,
    advance: Advance,
) -> Answers:
    key = f"{suite.purpose}:{suite.name}"
    known: dict[int, Any] = {}
    seconds = 0.0
    for record in journal.records():
        if record.get("suite") == key:
            known.update(zip(record["examples"], record["answers"], strict=True))
            seconds += record["seconds"]
    for batch in batches:
        missing = [index for index in batch if index not in known]
        if missing:
            started = time.perf_counter()
            answers = run(missing)
            took = time.perf_counter() - started
            journal.append({"suite": key, "examples": missing, "answers": answers, "seconds": round(took, 4)})
            known.update(zip(missing, answers, strict=True))
            seconds += took
        advance(len(batch))
    return Answers([known[index] for index in range(len(suite.examples))], seconds)


def finite(scores: Sequence[float | None]) -> np.ndarray | None:
    """The scores as an array, None where one of them is not finite."""
    return None if any(score is None for score in scores) else np.array(scores, dtype=float)
