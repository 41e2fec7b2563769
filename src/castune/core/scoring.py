"""Scoring replies and multiple-choice questions by log-probability.

A question becomes rows (`question_rows`), rows become token log-probabilities (`score_rows`), and those of a
question become the scores of its choices (`choice_scores`), from which decision and margin follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from castune.core.losses import RowBatch, batches_by_length, token_log_probs
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row

Floats = NDArray[np.float64]


def question_rows(chat: ChatFormat, example: Example) -> list[Row]:
    """The rows that score a multiple-choice example.

    `letter`: one row; all option letters are scored at the first reply token. `likelihood`: a row a choice; its
    value is the mean log-probability a token of the choice, end-of-turn not counted.
    """
    if example.scoring == "letter":
        prompt, cut = chat.prompt_ids(example, reserve=1)
        letters = tuple(chat.letter_token(i) for i in range(len(example.choices)))
        return [Row(tuple(prompt), (len(prompt) - 1,) * len(letters), letters, cut)]
    return [chat.reply_row(example, choice, end_of_turn=False) for choice in example.choices]


def choice_scores(example: Example, values: Sequence[Floats]) -> Floats:
    """Scores of the choices from the token log-probabilities of the example's rows."""
    if example.scoring == "letter":
        return values[0]
    return np.array([row.mean() for row in values])


def is_correct(example: Example, scores: Floats) -> bool:
    """Whether the best-scored choice is the right one (the first of equals counts as chosen)."""
    return int(np.argmax(scores)) == example.answer


def answer_margin(example: Example, scores: Floats) -> float:
    """Log-probability of the right choice minus that of the best wrong one; positive exactly when correct."""
    assert example.answer is not None
    wrong = np.delete(scores, example.answer)
    return float(scores[example.answer] - wrong.max())


@torch.no_grad()
def score_rows(model: nn.Module, rows: Sequence[Row], *, batch_tokens: int) -> list[Floats]:
    """Log-probabilities of every row's scored tokens, in the order of `rows`."""
    values: list[Floats] = [np.empty(0)] * len(rows)
    for indices in batches_by_length([len(row.ids) for row in rows], batch_tokens):
        for index, value in zip(indices, score_batch(model, [rows[i] for i in indices]), strict=True):
            values[index] = value
    return values


@torch.no_grad()
def score_batch(model: nn.Module, rows: Sequence[Row]) -> list[Floats]:
    """Log-probabilities of the scored tokens of rows that fit into one forward."""
    batch = RowBatch.of(rows, next(model.parameters()).device)
    log_probs = token_log_probs(model, batch).double().cpu().numpy()
    return [log_probs[i, : len(row.tokens)] for i, row in enumerate(rows)]
