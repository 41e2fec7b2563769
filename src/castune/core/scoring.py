"""Scoring replies and multiple-choice questions by log-probability.

A question becomes rows (`question_rows`), rows become token log-probabilities (`score_rows`), and those of a
question become the scores of its choices (`reply_means`), from which decision and margin follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from castune.core.losses import RowBatch, batches_by_length, token_log_probs
from castune.data.chat import ChatFormat
from castune.data.example import Example
from castune.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]


def question_rows(chat: ChatFormat, example: Example, *, share_prompt: bool) -> list[Row]:
    """The rows that score a multiple-choice example.

    `letter`: one row; all option letters are scored at the first reply token, from float32 logits. `likelihood`: the
    mean log-probability per token of each choice as the reply, end-of-turn not counted.

    Args:
        chat: tokenizer and template.
        example: the question.
        share_prompt: put all choices behind one prompt (see `can_share_prompts`), else a row a choice.
    """
    prompt, choices = chat.choices(example)
    if example.scoring == "letter":
        row = chat.row(example, prompt, choices[:1])
        letters = tuple(token for [token] in choices)
        return [replace(row, positions=row.positions * len(letters), tokens=letters, float32_logits=True)]
    return reply_rows(chat, example, prompt, choices, share_prompt=share_prompt)


def reply_rows(
    chat: ChatFormat,
    example: Example,
    prompt: Sequence[int],
    replies: Sequence[Sequence[int]],
    *,
    share_prompt: bool,
) -> list[Row]:
    """Rows that score several replies to one prompt of the example's: one shared row, or a row each."""
    if share_prompt:
        return [chat.row(example, prompt, replies)]
    return [chat.row(example, prompt, [reply]) for reply in replies]


def refusal_pair(
    chat: ChatFormat, example: Example, refusal: str, own: Sequence[int], *, n_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """The prompt, and the first tokens of a refusal and of another reply to it: what a refusal margin compares.

    Args:
        chat: tokenizer and template.
        example: the prompt.
        refusal: a refusal.
        own: tokens of the other reply, as the model wrote it after the generation prompt.
        n_tokens: how many tokens of each.
    """
    prompt, [refusing] = chat.continuations(example, [refusal])
    # Where the template says more when it asks for a reply, that belongs to the model's own.
    asked, _ = chat.prompt_ids(example, reserve=n_tokens)
    return prompt, [refusing[:n_tokens], [*asked[len(prompt) :], *own][:n_tokens]]


def reply_means(rows: Sequence[Row], values: Sequence[Floats]) -> Floats:
    """Mean log-probability per token of each reply, from the values of the rows of one example.

    Of lettered choices a reply is one letter, so that its mean is its own log-probability.
    """
    flat = np.concatenate(list(values))
    lengths = [length for row in rows for length in row.reply_lengths]
    ends = np.cumsum(lengths)
    return np.array([flat[end - length : end].mean() for length, end in zip(lengths, ends, strict=True)])


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel, *, longest: int) -> bool:
    """Whether replies that share one prompt row score as they do alone, for this model.

    It holds where the attention takes an explicit mask and position ids. It is checked on a small example, and
    ruled out for sequences beyond a sliding window, which an explicit mask would switch off.

    Args:
        model: the model, in evaluation mode.
        longest: length of the longest shared row, in tokens.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window is not None and longest > window:
        return False
    prompt, replies = (5, 6, 7, 8), ((9, 10, 11), (12,), (13, 14, 15))
    try:
        shared = score_batch(model, [Row.of_replies(prompt, replies)])[0]
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        logger.warning("this model cannot share prompts (%r): scoring one row per reply, which is slower", error)
        return False
    alone = np.concatenate(score_batch(model, [Row.of_replies(prompt, [reply]) for reply in replies]))
    # bfloat16 keeps 8 bits: log-probabilities of magnitude 10 carry an error of a few hundredths.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.2
    return bool(np.abs(shared - alone).max() <= tolerance)


def shared_if_exact(model: PreTrainedModel, build: Callable[[bool], list[list[Row]]]) -> list[list[Row]]:
    """Rows whose replies share their prompt where this model scores them as it does alone, else a row a reply."""
    rows_of = build(True)
    longest = max(len(row.ids) for rows in rows_of for row in rows)
    return rows_of if can_share_prompts(model, longest=longest) else build(False)


def is_correct(example: Example, scores: Floats) -> bool:
    """Whether the right choice is scored above every other; a tie is no right answer."""
    return answer_margin(example, scores) > 0


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
