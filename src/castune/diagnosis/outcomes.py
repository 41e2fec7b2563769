"""Outcomes of examples as functions of the log-probabilities of their scored tokens, with their derivatives. Pure.

Every margin is a difference of means of log-probabilities once it is settled which wrong answer is the best one, so
that its derivative is a constant for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from castune.core.scoring import answer_margin, is_correct, reply_means
from castune.data.example import Example
from castune.data.rows import Row
from castune.diagnosis.score import Floats


class Outcome(Protocol):
    """What is read of an example.

    Attributes:
        rows_of: the rows of each example.
    """

    @property
    def rows_of(self) -> Sequence[Sequence[Row]]: ...  # noqa: D102

    def __call__(self, n: int, values: Sequence[Floats]) -> float:
        """The outcome of the n-th example, from the log-probabilities of its rows' scored tokens; NaN: unscored."""

    def derivative(self, n: int, values: Sequence[Floats]) -> list[Floats]:
        """Its derivative by each of these log-probabilities, shaped as they are."""


@dataclass(frozen=True)
class Answer:
    """A question: right or wrong, or the margin of the right choice over the best wrong one."""

    rows_of: Sequence[Sequence[Row]]
    examples: Sequence[Example]
    by_margin: bool

    def __call__(self, n: int, values: Sequence[Floats]) -> float:  # noqa: D102
        scores = reply_means(self.rows_of[n], values)
        if not np.isfinite(scores).all():
            return np.nan
        example = self.examples[n]
        return answer_margin(example, scores) if self.by_margin else is_correct(example, scores)

    def derivative(self, n: int, values: Sequence[Floats]) -> list[Floats]:  # noqa: D102
        scores, answer = reply_means(self.rows_of[n], values), self.examples[n].answer
        assert answer is not None
        by_choice = np.zeros(len(scores))
        by_choice[answer] = 1
        wrong = np.where(np.arange(len(scores)) == answer, -np.inf, scores)
        by_choice[int(wrong.argmax())] = -1
        return _by_token(self.rows_of[n], by_choice)


@dataclass(frozen=True)
class Likelihood:
    """A worked solution: its mean log-probability per token."""

    rows_of: Sequence[Sequence[Row]]

    def __call__(self, n: int, values: Sequence[Floats]) -> float:  # noqa: D102
        return float(values[0].mean())

    def derivative(self, n: int, values: Sequence[Floats]) -> list[Floats]:  # noqa: D102
        return [np.full(len(values[0]), 1 / len(values[0]))]


@dataclass(frozen=True)
class Preference:
    """A prompt with two replies: mean log-probability per token of the first minus that of the second."""

    rows_of: Sequence[Sequence[Row]]

    def __call__(self, n: int, values: Sequence[Floats]) -> float:  # noqa: D102
        first, second = reply_means(self.rows_of[n], values)
        return float(first - second)

    def derivative(self, n: int, values: Sequence[Floats]) -> list[Floats]:  # noqa: D102
        return _by_token(self.rows_of[n], np.array([1.0, -1.0]))


def _by_token(rows: Sequence[Row], by_reply: Floats) -> list[Floats]:
    """Derivatives by the mean of each reply, as those by its tokens, row by row."""
    replies = iter(by_reply)
    return [np.concatenate([np.full(k, next(replies) / k) for k in row.reply_lengths]) for row in rows]
